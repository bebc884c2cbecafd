"""One block of rows, from logits to weights and to their gradient: the way through it that fits its teacher and
objective. All ways give the same result. b rows, v vocabulary."""

from __future__ import annotations

from torch import Tensor

from selectkd.loss.aligned_rows import AlignedChunk
from selectkd.loss.block_autograd import evaluate_aligned, evaluate_by_autograd, evaluate_top_k
from selectkd.loss.block_compiled import compiled_block
from selectkd.loss.block_eager import evaluate_closed_form
from selectkd.loss.block_steps import BlockConfig, BlockInputs, BlockResult, pair_at
from selectkd.loss.teacher_rows import CachedChunk, LiveChunk, Scratch, TeacherChunk


def evaluate_block(
    raw: Tensor, block: slice, teacher: TeacherChunk, rows: BlockInputs, config: BlockConfig, scratch: Scratch
) -> BlockResult:
    """Divergence, weight and acceptance of the rows of a block; the gradient of sum scale * weight * divergence
    overwrites the head's product in ``raw[block]`` [b, v]."""
    if isinstance(teacher, AlignedChunk):
        return evaluate_aligned(raw, block, teacher, rows, config)
    objective, verified = config.objective, None
    scored = rows.acceptance is None or objective.routes_rows
    if scored and objective.verify_temperature != config.options.temperature:
        verified = pair_at(objective.verify_temperature, raw, block, teacher, rows, config)
    if isinstance(teacher, LiveChunk) and config.has_closed_form:
        compiled = compiled_block(config) if config.options.compiled else None
        return evaluate_closed_form(raw, block, teacher, rows, config, scratch, verified, compiled)
    if isinstance(teacher, CachedChunk):
        return evaluate_top_k(raw, block, teacher, rows, config, scratch, verified)
    return evaluate_by_autograd(raw, block, teacher, rows, config, verified)
