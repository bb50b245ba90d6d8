"""On a GPU changes to single tokens are torch operations: few adapters have any, no kernel is worth
writing for them yet. They copy those rows, and such steps are not recorded in graphs."""

from loramux_kernels.vocabulary.reference import change_embeddings, change_logits

__all__ = ["change_embeddings", "change_logits"]
