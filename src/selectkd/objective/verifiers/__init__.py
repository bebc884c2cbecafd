"""Verifiers: how far the teacher accepts the student's proposal at each position. VERIFIERS names them all.

A verifier is ``__call__(pair, uniform [n, r]) -> acceptance [n]``, in [0, 1] unless its traits say ``above_one``: a
plain function, or an object with ``traits = VerifierTraits(...)``, which states what it reads and how its rows are
handed to it. Ours are frozen dataclasses. One that can decide by sums over the vocabulary also has
``from_statistics(statistics, uniform)``, which the fused loss and the kernels for accelerators ask; one that needs
whole sequences or the whole batch also has ``score`` and ``keep``, as a selector does. A class without ``traits`` may
state each one as an attribute of its name.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

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
from selectkd.objective.verifiers.traits import VerifierTraits, traits_of
from selectkd.objective.verifiers.weights import fire, iw_opd, prefix_product, sigmoid_entropy_gap


@runtime_checkable
class Verifier(Protocol):
    """What an objective needs of a verifier: to be called. ``VerifierTraits`` has what else one may state."""

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]: ...


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
        "sigmoid_entropy_gap": sigmoid_entropy_gap,
        "iw_opd": iw_opd,
        "fire": fire,
        "prefix_product": prefix_product,
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
    "VerifierTraits",
    "always",
    "expected_spec_k",
    "fire",
    "greedy_topk",
    "hellinger",
    "iw_opd",
    "label_top_k",
    "matched_position",
    "matched_random",
    "matched_shuffle",
    "prefix_gate",
    "prefix_product",
    "sigmoid_entropy_gap",
    "spec_k",
    "spec_k_literal",
    "student_entropy",
    "teacher_entropy",
    "traits_of",
]


def __getattr__(name: str) -> Any:
    if name != "reads_proposal_alone":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("use traits_of(verifier).crosses_vocabularies", DeprecationWarning, stacklevel=2)
    return lambda verifier: traits_of(verifier).crosses_vocabularies
