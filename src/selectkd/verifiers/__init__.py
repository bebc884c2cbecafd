"""Verifiers: how far the teacher accepts the student's proposal at each position. VERIFIERS names them all.

A verifier is a frozen dataclass with ``uniforms_per_token`` (columns of uniform numbers it reads), ``teacher_tokens``
(how many of the teacher's best tokens it needs; None: exact only with the whole vocabulary, a bound otherwise) and
``__call__(pair, uniform [n, r]) -> acceptance [n] in [0, 1]``. One that can judge by sums over the vocabulary also has
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

from selectkd.pair import TokenPair
from selectkd.verifiers.controls import always, matched_random, matched_shuffle
from selectkd.verifiers.gates import hellinger, label_top_k, prefix_gate, student_entropy, teacher_entropy
from selectkd.verifiers.selectkd import expected_spec_k, greedy_topk, spec_k, spec_k_literal
from selectkd.verifiers.statistics import STATISTICS, RowStatistics


@runtime_checkable
class Verifier(Protocol):
    """What an objective needs of a verifier."""

    @property
    def uniforms_per_token(self) -> int: ...

    @property
    def teacher_tokens(self) -> int | None: ...

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]: ...


def reads_proposal_alone(verifier: Verifier) -> bool:
    """Whether a verifier asks of the student its proposal alone, or nothing: then it can judge across vocabularies."""
    return verifier.teacher_tokens == 0 or getattr(verifier, "proposal_alone", False)


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
    "matched_random",
    "matched_shuffle",
    "prefix_gate",
    "reads_proposal_alone",
    "spec_k",
    "spec_k_literal",
    "student_entropy",
    "teacher_entropy",
]
