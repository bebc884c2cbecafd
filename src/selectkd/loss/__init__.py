"""The fused loss: rows of both models become loss and gradient; no [n, v] tensor exists. Torch and jaxtyping alone."""
