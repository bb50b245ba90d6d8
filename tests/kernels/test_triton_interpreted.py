"""The GPU tests of the kernels without a GPU. Half a minute: the interpreter takes milliseconds for
a program."""

from __future__ import annotations

from tests import interpreter


def test_gpu_tests_pass_under_the_interpreter() -> None:
    interpreter.passes("tests/kernels/test_gpu.py")
