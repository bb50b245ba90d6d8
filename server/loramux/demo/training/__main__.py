"""Train all demo models, heads and adapters again: ``python -m loramux.demo.training``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .train_acceptance import train_acceptance
from .train_adapters import train_adapters, train_small_adapters
from .train_base import train_base
from .train_draft import train_draft
from .train_heads import train_heads

DEMO = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the demo models (about an hour on two cores)."
    )
    parser.add_argument(
        "--out", type=Path, default=DEMO, help="where base/, draft/ and the adapters go"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    base = args.out / "base"
    train_base(base)
    train_draft(args.out / "draft", base)
    train_acceptance(args.out / "draft", base)
    train_heads(base)
    train_adapters(args.out / "adapters", base)
    train_small_adapters(args.out / "small_adapters", args.out / "draft", base)


if __name__ == "__main__":
    main()
