"""The GPU tests of the kernels without a GPU."""

from __future__ import annotations

import pytest
from tests import interpreter


@pytest.mark.slow  # half a minute: the interpreter takes milliseconds for a program
@pytest.mark.timeout(1800)
def test_gpu_tests_pass_under_the_interpreter() -> None:
    interpreter.passes("tests/kernels/test_gpu.py")
