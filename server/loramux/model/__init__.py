"""The base model: what it computes (architecture), its bytes (loader), its forward (decoder)."""
