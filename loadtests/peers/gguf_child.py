"""Runs llama.cpp's conversion scripts one after the other in one process; see ``llama_cpp.py``.

The made-up tokenizer is unknown to the table of pre-tokenizers there. No text is ever tokenized, so
any name does.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path


def main() -> None:
    for script, *arguments in json.loads(sys.argv[1]):
        sys.path[0] = str(Path(script).parent)
        from conversion.base import TextModel

        TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
        sys.argv = [script, *arguments]
        runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
