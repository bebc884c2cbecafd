"""What a verifier or selector states of itself, and ``traits_of``, which tells it of any."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from selectkd.objective.verifiers.row_statistics import STATISTICS


@dataclass(frozen=True)
class VerifierTraits:
    """How a verifier or selector is called, and what of both models it needs. The defaults hold for a plain function.

    uniforms_per_token: columns of uniform numbers it reads. teacher_tokens: how many of the teacher's best tokens it
    needs; None: the whole vocabulary. reads: the statistics, beside the overlap, by which ``from_statistics`` decides;
    None: it has no ``from_statistics``. scope: the rows that ``score`` and ``keep`` rank against each other, those of
    the optimizer step or of each sequence; None: it has no ``keep`` and decides row by row. proposal_alone: of the
    student it looks at its most probable token alone, which can be translated to another vocabulary. needs_reference:
    it compares with a reference student. from_top_k: how the acceptance from K tokens and a tail bounds the true one,
    where teacher_tokens is None; None: it has no bound. above_one: whether its acceptance may exceed 1, as a weight.
    """

    uniforms_per_token: int = 0
    teacher_tokens: int | None = None
    reads: tuple[str, ...] | None = None
    scope: Literal["step", "sequence"] | None = None
    proposal_alone: bool = False
    needs_reference: bool = False
    from_top_k: Literal["upper bound", "lower bound"] | None = None
    above_one: bool = False

    @property
    def ranks(self) -> bool:
        """Whether rows are ranked against each other, which takes a first pass over all of them."""
        return self.scope is not None

    @property
    def crosses_vocabularies(self) -> bool:
        """Whether it can verify a student whose tokens are not the teacher's."""
        return self.teacher_tokens == 0 or self.proposal_alone


_OF_METHODS = {"reads": ("from_statistics", STATISTICS), "scope": ("keep", "step")}
"""Traits that hold where a method is there, and what they are where nothing is stated."""


def traits_of(component: Any) -> VerifierTraits:
    """The traits of a verifier, selector or extra: its ``traits``, else the defaults; an attribute with the name of a
    trait comes first.

    >>> def sure(pair, uniform):
    ...     return (pair.logp.amax(-1) > -1.0).float()
    >>> traits_of(sure) == VerifierTraits()
    True
    >>> sure.uniforms_per_token = 2
    >>> traits_of(sure).uniforms_per_token
    2
    """

    def attribute(name: str, otherwise: Any = None) -> Any:
        return getattr(component, name, otherwise)

    stated = attribute("traits")
    if not isinstance(stated, VerifierTraits):
        stated = VerifierTraits()
    found = {name: attribute(name, value) for name, value in vars(stated).items()}
    for trait, (method, default) in _OF_METHODS.items():
        if attribute(method) is None:
            found[trait] = None
        elif found[trait] is None:
            found[trait] = default
    return VerifierTraits(**found)
