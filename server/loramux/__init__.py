"""loramux: one base language model, thousands of LoRA adapters, one batch.

Importing this package is cheap on purpose: the front process never loads torch, and the
modules that do are imported by the process that needs them.
"""

__version__ = "0.1.0"
