"""What the scheduler asks for and what the model gives back: a row is (request, model_id)."""

from __future__ import annotations
