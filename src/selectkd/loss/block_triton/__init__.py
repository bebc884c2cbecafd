"""Triton kernels for a chunk of rows on an accelerator: what ``block`` does, in one launch for the statistics and one
for the gradient, without a temporary of the chunk's size. Imported only where the tensors are on an accelerator
(``by_device`` decides); ``block.evaluate_block`` is the reference.
"""

from selectkd.loss.block_triton.formulas import TERMS
from selectkd.loss.block_triton.launch import CannotLaunch, claims, evaluate_chunk

__all__ = ["TERMS", "CannotLaunch", "claims", "evaluate_chunk"]
