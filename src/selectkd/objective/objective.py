"""Objective: a divergence, a verifier and beta; what one row is worth and how far it counts.

n rows. The weight is V = beta + (1 - beta) a; the loss of a row is V * D(p || q), undivided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences import DIVERGENCES, LABEL_LOSSES, reads_label
from selectkd.objective.divergences.router import check_routes, gates_in, is_router, routed
from selectkd.objective.pair import TokenPair, one_of
from selectkd.objective.registry import Spec, bind, build, name_of
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS, VerifierTraits, matched_shuffle, traits_of

LOSSES = {**DIVERGENCES, **LABEL_LOSSES}


class TokenLoss(NamedTuple):
    """What an objective says of n rows: divergence (with gradient), weight, acceptance and overlap, each [n]."""

    divergence: Float[Tensor, " n"]
    weight: Float[Tensor, " n"]
    acceptance: Float[Tensor, " n"]
    overlap: Float[Tensor, " n"]


@dataclass(frozen=True)
class Objective:
    """Per row: weight (beta + (1 - beta) a) times divergence D(p || q); the weight carries no gradient.

    divergence: a name of DIVERGENCES or LABEL_LOSSES, {"name": ..., **params}, "module:function", or a function
    (logp, logq) -> [n]. verifier: a name of VERIFIERS or SELECTORS, {"name": ..., **params}, "module:factory", or an
    instance of one. beta: weight of a rejected row, in [0, 1]; 0 masks it, 1 is the plain divergence. Default .01 as
    in the paper. always_accept: token ids whose rows are accepted whatever the verifier says (needs labels), for
    instance EOS. verify_temperature: verification, selectors, and the gates of a router, use p and q at this
    temperature, whatever the temperature of the loss. thin_rejected: keep a row with probability V at weight 1, and
    drop it otherwise: an unbiased estimate of the loss and its gradient in which dropped rows cost no gradient product.
    Reads one more uniform number a token.
    Source: SelecTKD (arXiv 2510.24021), equation 4 and Algorithm 1.

    >>> import torch
    >>> from selectkd.objective.pair import dense_pair
    >>> objective = Objective("forward_kl", {"name": "greedy_topk", "k": 1}, beta=0.01)
    >>> p, q = torch.tensor([[0.7, 0.3]] * 2), torch.tensor([[0.6, 0.4], [0.4, 0.6]])
    >>> objective(dense_pair(p.log(), q.log()), torch.empty(2, 0)).weight.tolist()
    [1.0, 0.009999999776482582]
    """

    divergence: Spec = "forward_kl"
    verifier: Any = "greedy_topk"
    beta: float = 0.01
    always_accept: tuple[int, ...] = field(default=(), kw_only=True)
    verify_temperature: float = field(default=1.0, kw_only=True)
    thin_rejected: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ConfigError(
                f"beta = {self.beta} must lie in [0, 1]; 0 masks rejected tokens, 1 is plain distillation."
            )
        if not self.verify_temperature > 0:
            raise ConfigError(f"verify_temperature = {self.verify_temperature} must be above 0.")
        object.__setattr__(self, "divergence", bind(LOSSES, self.divergence, kind="divergence"))
        check_routes(self.divergence)
        table = {**VERIFIERS, **SELECTORS}
        object.__setattr__(self, "verifier", build(table, self.verifier, kind="verifier or selector"))
        # rows that are accepted anyway are no part of a rate
        if self.always_accept and isinstance(self.verifier, matched_shuffle):
            object.__setattr__(self, "verifier", replace(self.verifier, spared=self.always_accept))
        if self.thin_rejected and self.traits.above_one:
            raise ConfigError(
                f"thin_rejected keeps a row with probability equal to its weight, and {name_of(self.verifier)} weighs "
                "rows above 1. Leave out thin_rejected."
            )

    @cached_property
    def traits(self) -> VerifierTraits:
        """What the verifier states of itself."""
        return traits_of(self.verifier)

    @property
    def uniforms_per_token(self) -> int:
        """Columns of uniform numbers a call reads: the verifier's, and one more to thin rejected rows."""
        return self.traits.uniforms_per_token + self.thin_rejected

    @property
    def teacher_tokens(self) -> int | None:
        """How many of the teacher's best tokens the verifier needs: see ``VerifierTraits``."""
        return self.traits.teacher_tokens

    @property
    def gates(self) -> tuple[Any, ...]:
        """All that look at rows at the temperature of verification: the verifier, and the gates of a router."""
        return (self.verifier, *gates_in(self.divergence))

    @property
    def routes_rows(self) -> bool:
        """Whether the divergence depends on the row: its gates ask for the pair that verification sees."""
        return is_router(self.divergence)

    @property
    def drops_rows(self) -> bool:
        """Whether some rows may have weight 0, so that it pays to look for them."""
        return self.beta == 0.0 or self.thin_rejected

    @property
    def reads_statistics(self) -> bool:
        """Whether the verifier can decide by ``RowStatistics`` alone, without a pair."""
        return self.traits.reads is not None

    @property
    def ranks_the_batch(self) -> bool:
        """Whether the verifier needs a first pass over all rows: it has ``keep`` as well as ``score``. Rows are ranked
        over what the caller hands in at once; a training step hands in the acceptance of its ranking over all of it."""
        return self.traits.ranks

    @torch.no_grad()
    def accept(self, pair: TokenPair, uniform: Float[Tensor, "n r"]) -> Float[Tensor, " n"]:
        """The acceptance of a pair's rows, [n] in [0, 1], before ``always_accept``."""
        return self.verifier(pair, uniform)

    def weigh(
        self,
        pair: TokenPair,
        uniform: Float[Tensor, "n r"],
        *,
        acceptance: Float[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """(weight, acceptance) of the rows of the pair the verifier sees; ``acceptance`` is a first pass's result."""
        if acceptance is None:
            acceptance = self.accept(pair, uniform)
        return self.weight_of(acceptance.to(pair.logq.dtype), uniform, label=pair.label, finite=pair.finite)

    def weight_of(
        self,
        acceptance: Float[Tensor, " n"],
        uniform: Float[Tensor, "n r"],
        *,
        label: Int[Tensor, " n"] | None = None,
        finite: Bool[Tensor, " n"] | None = None,
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """(weight, acceptance) from the verifier's acceptance: ``always_accept``, beta, thinning, faulty rows."""
        if self.always_accept:
            if label is None:
                raise ConfigError("always_accept reads the tokens of the text; pass labels=[n].")
            named = one_of(label, self.always_accept)
            acceptance = torch.where(named, torch.ones_like(acceptance), acceptance)
        # exactly 1 and beta at a = 1 and a = 0, and exactly 1 everywhere at beta = 1
        if self.beta < 1.0:
            weight = torch.where(acceptance == 1.0, 1.0, acceptance + self.beta * (1.0 - acceptance))
        else:
            weight = torch.ones_like(acceptance)
        if self.thin_rejected:
            # weight 1 with probability V instead of weight V: the same mean, and rows without gradient products
            weight = (uniform[:, -1].to(weight.dtype) < weight).to(weight.dtype)
        if finite is not None:
            weight = weight * finite  # a teacher row that is not finite teaches nothing
        return weight, acceptance

    def __call__(
        self,
        pair: TokenPair,
        uniform: Float[Tensor, "n r"],
        *,
        verified: TokenPair | None = None,
        acceptance: Float[Tensor, " n"] | None = None,
    ) -> TokenLoss:
        """Loss and verdict of each row; ``verified`` is the pair at the verification temperature where that differs, by
        which a router's gates decide too, ``acceptance`` the result of a first pass where there was one."""
        verified = pair if verified is None else verified
        weight, acceptance = self.weigh(verified, uniform, acceptance=acceptance)
        with torch.no_grad():
            overlap = verified.overlap
        divergence: Callable[..., Tensor] = self.divergence  # type: ignore[assignment]
        if self.routes_rows:
            value = routed(divergence, pair, verified)
        else:
            value = divergence(pair.logp, pair.logq, *self._column(pair))
        return TokenLoss(value, weight, acceptance, overlap)

    def _column(self, pair: TokenPair) -> tuple[Int[Tensor, " n"], ...]:
        """Where the text's tokens stand, for a loss that looks at them."""
        if not reads_label(self.divergence):
            return ()
        if pair.label is None:
            raise ConfigError(
                f"{name_of(self.divergence)} reads the tokens of the text; pass labels=[n] to distillation_loss."
            )
        return (pair.column(pair.label),)
