"""What one token costs: a divergence, a verifier or selector, and beta. Imports torch and jaxtyping alone.

``registry`` and ``plugins`` import no torch, so that recipes are checked without it.
"""
