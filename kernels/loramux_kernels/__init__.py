"""The operations loramux adds to a transformer: segmented LoRA, paged attention, norms, sampling.

Each operation lives in a folder whose ``__init__`` states its algebra in one line, beside an
obvious torch ``reference.py``, a ``cpu.py`` (numba) where it pays, and Triton kernels for CUDA.
This package never imports ``loramux``.
"""
