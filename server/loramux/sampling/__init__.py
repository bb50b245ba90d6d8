"""From logits to tokens: the processors of the sampling parameters, the keyed draw, logprobs.

The order is fixed: logit_bias, min_tokens, penalties (``processors``), then temperature, min_p,
top_k, top_p and the draw itself (``loramux_kernels.sampling``, where the contract stands).
"""
