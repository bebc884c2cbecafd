"""Selectors that rank rows: a score per row times a keep rule. SELECTORS names them all.

A selector is a frozen dataclass with ``score(pair, uniform) -> [n, m]`` (token-local, gathered in a first pass over
the vocabulary) and ``keep(scores, sequence) -> acceptance [n]``. In training it is handed the rows of a whole optimizer
step, or, where it has ``scope = "sequence"``, whole sequences at least. An Objective takes one in place of a verifier.

The published ones are below, each a score and a share of the batch to keep. n rows, s support columns, m scores a row.
Class names are the registry's names. ``share`` is the part of the rows that gets a = 1, the best scores first, ties in
row order; at least one row is kept. ``scope``: the rows that are ranked together, those of an optimizer step, over its
micro-batches and all ranks, or those of each sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.kl import forward_kl
from selectkd.objective.pair import TokenPair, entropy, hellinger_distance, label_log_prob, sequence_of
from selectkd.objective.verifiers.traits import VerifierTraits

SCOPES = ("step", "sequence")
QUANTILE = 0.05
"""Where teachability clips what it multiplies, at each end."""


def top_fraction(score: Float[Tensor, " n"], kept: float) -> Float[Tensor, " n"]:
    """1 for the ceil(kept * n) rows with the highest score, 0 for the rest: [n]. What is not finite comes last."""
    score = torch.where(score.isfinite(), score, -math.inf)
    count = math.ceil(kept * score.shape[0] - 1e-9)
    best = torch.argsort(score, descending=True, stable=True)[:count]
    return torch.zeros_like(score).scatter(0, best, 1.0)


def normalised(score: Float[Tensor, " n"], *, clip: float = 0.0) -> Float[Tensor, " n"]:
    """The score scaled to [0, 1] over the rows that have a finite one, 0 where those are equal; nan for the others.

    clip: each end is first clipped to this quantile of the finite scores (linear between order statistics).
    """
    finite = score.isfinite()
    ascending, count = torch.where(finite, score, math.inf).sort().values, finite.sum()
    low, high = (_quantile(ascending, count, q) for q in (clip, 1.0 - clip))
    scaled = (score.clamp(low, high) - low) / (high - low).clamp(min=torch.finfo(score.dtype).tiny)
    return torch.where(finite, scaled, math.nan)


def _quantile(ascending: Float[Tensor, " n"], count: Int[Tensor, ""], q: float) -> Float[Tensor, ""]:
    """The q-quantile of the first ``count``, whose number the host need not know."""
    at = q * (count - 1).clamp(min=0).to(ascending.dtype)
    low, high = (ascending.gather(0, place.long()[None])[0] for place in (at.floor(), at.ceil()))
    return low + (at - at.floor()) * (high - low)


def reference_of(pair: TokenPair, name: str) -> Float[Tensor, "n s"]:
    """The reference student's log-probabilities, or a ConfigError that says who needs them."""
    if pair.logr is None:
        raise ConfigError(
            f"{name} compares with a reference student; give LiveRows one: reference=LiveRows(...)."
        )
    return pair.logr


@runtime_checkable
class Selector(Protocol):
    """What an objective needs of a selector: a verifier with a first pass."""

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]: ...

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]: ...

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]: ...


@dataclass(frozen=True)
class Ranked:
    """score x top share; the parent of every selector here."""

    share: float = 0.5
    scope: str = field(default="step", kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 < self.share <= 1.0:
            raise ConfigError(f"{type(self).__name__}(share={self.share}): share must lie in (0, 1].")
        if self.scope not in SCOPES:
            raise ConfigError(f"{type(self).__name__}(scope={self.scope!r}): scope is step or sequence.")

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        raise TypeError(f"{type(self).__name__} states no score")

    def combined(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
        """The one number by which rows are ranked, of all that are ranked together."""
        return scores[:, 0]

    def keep(self, scores: Float[Tensor, "n m"], sequence: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        if self.scope == "step":
            return top_fraction(self.combined(scores), self.share)
        kept = torch.zeros_like(scores[:, 0])
        for one in sequence.unique():
            rows = (sequence == one).nonzero()[:, 0]
            kept[rows] = top_fraction(self.combined(scores[rows]), self.share)
        return kept

    def __call__(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        return self.keep(self.score(pair, uniform), sequence_of(pair))


@dataclass(frozen=True)
class se_kd(Ranked):
    """SE-KD: the 20% of rows where the student's entropy is highest; its release has ``scope: sequence``."""

    share: float = 0.2

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        return entropy(pair.logq)[:, None]


@dataclass(frozen=True)
class tip(Ranked):
    """TIP: the 50% of rows with the highest 1 - (1 - h)(1 - d), h student entropy and d KL(p || q), each scaled to
    [0, 1] over the rows that are ranked together."""

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        return torch.stack([entropy(pair.logq), forward_kl(pair.logp, pair.logq)], -1)  # [n, 2]

    def combined(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
        h, d = normalised(scores[:, 0]), normalised(scores[:, 1])
        return 1.0 - (1.0 - h) * (1.0 - d)


@dataclass(frozen=True)
class teachability(Ranked):
    """Teachability: the 5% of rows with the highest d m, d = KL(p || q) and m p's mass on the student's ``top`` best.

    Both are clipped to their 5% and 95% quantiles and scaled to [0, 1] before they are multiplied.
    """

    share: float = 0.05
    top: int = 16

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        singles = pair.logq[:, : pair.ranked.shape[-1]]
        best = singles.topk(min(self.top, singles.shape[-1]), -1).indices  # [n, top]
        mass = pair.ranked.gather(-1, best).exp().sum(-1)
        return torch.stack([forward_kl(pair.logp, pair.logq), mass], -1)  # [n, 2]

    def combined(self, scores: Float[Tensor, "n m"]) -> Float[Tensor, " n"]:
        d, m = (normalised(one, clip=QUANTILE) for one in scores.unbind(-1))
        return d * m


@dataclass(frozen=True)
class adaspec(Ranked):
    """AdaSPEC: the 40% of rows with the highest KL(p || q) - KL(p || q_ref), q_ref a reference student.

    Source: AdaSPEC (arXiv 2510.19779).
    """

    share: float = 0.4
    traits = VerifierTraits(needs_reference=True)

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        reference = reference_of(pair, "adaspec")
        return (forward_kl(pair.logp, pair.logq) - forward_kl(pair.logp, reference))[:, None]


@dataclass(frozen=True)
class atkd(Ranked):
    """ATKD's hard rows: the half with the highest uncertainty u = 1 - p(label).

    Source: ATKD (arXiv 2402.11890).
    """

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        return (1.0 - label_log_prob(pair, pair.logp, "atkd").exp())[:, None]


@dataclass(frozen=True)
class adakd(Ranked):
    """AdaKD: the rows with the highest Hellinger distance between teacher and student.

    change: by which part the share falls as the loss's moving average has fallen by that part since the share's last
    change, and grows as it has risen by it; the share stays in [floor, 1]. 0 keeps the share; the paper starts from 1
    with .1 (`method: adakd`).
    Source: AdaKD (arXiv 2510.11615), loss-driven adaptive token focusing, and its authors' code.
    """

    change: float = field(default=0.0, kw_only=True)
    floor: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.change < 1.0 or not 0.0 < self.floor <= self.share:
            raise ConfigError(
                f"adakd(change={self.change}, floor={self.floor}): change lies in [0, 1), floor above 0 and at most at "
                f"share = {self.share}."
            )

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        return hellinger_distance(pair.logp, pair.logq)[:, None]


@dataclass(frozen=True)
class rho_1(Ranked):
    """Rho-1: the 60% of rows with the highest excess loss, -log q(label) + log q_ref(label).

    Source: Rho-1 (arXiv 2404.07965).
    """

    share: float = 0.6
    traits = VerifierTraits(needs_reference=True)

    def score(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, "n m"]:
        reference = label_log_prob(pair, reference_of(pair, "rho_1"), "rho_1")
        return (reference - label_log_prob(pair, pair.logq, "rho_1"))[:, None]


SELECTORS: Mapping[str, Callable[..., Selector]] = MappingProxyType(
    {
        "se_kd": se_kd,
        "tip": tip,
        "teachability": teachability,
        "adaspec": adaspec,
        "atkd": atkd,
        "adakd": adakd,
        "rho_1": rho_1,
    }
)

__all__ = [
    "SELECTORS",
    "Selector",
    "adakd",
    "adaspec",
    "atkd",
    "rho_1",
    "se_kd",
    "teachability",
    "tip",
]
