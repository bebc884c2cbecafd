"""Verifiers: how far the teacher accepts the student's proposal at each position. VERIFIERS names them all.

A verifier is ``__call__(pair, uniform [n, r]) -> acceptance [n] in [0, 1]``; ours are frozen dataclasses with
``uniforms_per_token`` (columns of uniform numbers it reads; 0 where it does not say) and ``teacher_tokens`` (how many
of the teacher's best tokens it needs; None, also where it does not say: exact only with the whole vocabulary, a bound
otherwise). One that can judge by sums over the vocabulary also has
``from_statistics(statistics, uniform)``, which the fused loss and the kernels for accelerators ask; ``reads`` names the
statistics it looks at beside the overlap, which is always there (all of them, where it does not say). One that needs
whole sequences or the whole batch also has ``score`` and ``keep``, as a selector does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from selectkd.objective.pair import TokenPair
from selectkd.objective.verifiers.controls import always, matched_position, matched_random, matched_shuffle
from selectkd.objective.verifiers.gates import (
    hellinger,
    label_top_k,
    prefix_gate,
    student_entropy,
    teacher_entropy,
)
from selectkd.objective.verifiers.row_statistics import STATISTICS, RowStatistics
from selectkd.objective.verifiers.selectkd import expected_spec_k, greedy_topk, spec_k, spec_k_literal


@runtime_checkable
class Verifier(Protocol):
    """What an objective needs of a verifier: to be called. A plain function is one.

    What else it may say of itself, and what holds where it does not: ``uniforms_per_token``, the columns of uniform
    numbers it reads, 0; ``teacher_tokens``, how many of the teacher's best tokens it needs, None: all of them, so that
    a stored top-K gives it a bound at most.
    """

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]: ...


def uniforms_of(verifier: Verifier) -> int:
    """The columns of uniform numbers a verifier or selector reads; 0 where it does not say."""
    return getattr(verifier, "uniforms_per_token", 0)


def teacher_tokens_of(verifier: Verifier) -> int | None:
    """How many of the teacher's best tokens a verifier or selector needs; None, all of them, where it does not say."""
    return getattr(verifier, "teacher_tokens", None)


def reads_proposal_alone(verifier: Verifier) -> bool:
    """Whether a verifier asks of the student its proposal alone, or nothing: then it can judge across vocabularies."""
    return teacher_tokens_of(verifier) == 0 or getattr(verifier, "proposal_alone", False)


VERIFIERS: Mapping[str, Callable[..., Verifier]] = MappingProxyType(
    {
        "greedy_topk": greedy_topk,
        "spec_k": spec_k,
        "spec_k_literal": spec_k_literal,
        "expected_spec_k": expected_spec_k,
        "hellinger": hellinger,
        "teacher_entropy": teacher_entropy,
        "student_entropy": student_entropy,
        "label_top_k": label_top_k,
        "prefix_gate": prefix_gate,
        "always": always,
        "matched_random": matched_random,
        "matched_shuffle": matched_shuffle,
        "matched_position": matched_position,
    }
)

__all__ = [
    "STATISTICS",
    "VERIFIERS",
    "RowStatistics",
    "Verifier",
    "always",
    "expected_spec_k",
    "greedy_topk",
    "hellinger",
    "label_top_k",
    "matched_position",
    "matched_random",
    "matched_shuffle",
    "prefix_gate",
    "reads_proposal_alone",
    "spec_k",
    "spec_k_literal",
    "student_entropy",
    "teacher_entropy",
    "teacher_tokens_of",
    "uniforms_of",
]
