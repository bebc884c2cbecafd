"""ATKD: hard tokens learn the label's share and the rest, easy ones the rest alone. n rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.loss.terms import Forward, Term


@dataclass(frozen=True)
class atkd:
    """L = easy * mean NCKD(easy rows) + (1 - easy) * mean (TCKD + NCKD)(hard rows), the two of ``decoupled_kl``.

    A row is easy where u = 1 - p(label) lies below the median of the optimizer step, over its micro-batches and all
    ranks. The mean over a half is written as a scale n / n_half on the mean over all, so that it goes with
    ``token_mean``; the objective's own divergence is not used. A row whose teacher is not finite is in neither half.
    Default .2 as in the paper. Source: ATKD (arXiv 2402.11890).
    """

    easy: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.easy <= 1.0:
            raise ConfigError(f"atkd(easy={self.easy}): easy must lie in [0, 1].")

    def score(self, forward: Forward) -> Float[Tensor, "n 1"]:
        """The surprise u of each row."""
        return 1.0 - forward.seen_label_log_probs[:, :1].exp()

    def keep(self, scores: Float[Tensor, "n 1"], sequence: Int[Tensor, " n"]) -> Float[Tensor, "n 2"]:
        """1 where a row is hard, and its scale: n over the rows of its half, times what the half counts."""
        surprise, n = scores[:, 0], scores.shape[0]
        known = surprise[surprise.isfinite()].sort().values
        middle = known[[(known.shape[0] - 1) // 2, known.shape[0] // 2]].mean() if known.numel() else 0.0
        hard = surprise >= middle  # of nan nothing is
        count = hard.sum().to(scores.dtype)
        hard_scale = (1.0 - self.easy) * n / count.clamp(min=1.0)
        easy_scale = self.easy * n / (known.shape[0] - count).clamp(min=1.0)
        scale = torch.where(hard, hard_scale, easy_scale)
        return torch.stack([hard.to(scores.dtype), scale], -1)

    def __call__(
        self,
        forward: Forward,
        terms: list[Term],
        *,
        step: int,
        standing: Shaped[Tensor, "n ..."] | None = None,
    ) -> list[Term]:
        if not forward.labels.numel():
            return terms
        if standing is None:  # this batch is all there is
            standing = self.keep(self.score(forward), forward.sequence)
        result: list[Term] = []
        for term in terms:
            hard, scale = term.of(standing).unbind(-1)
            for rows, target in (((hard > 0).nonzero()[:, 0], 1.0), ((hard <= 0).nonzero()[:, 0], 0.0)):
                loss = {"name": "decoupled_kl", "target": target, "rest": 1.0}
                part = term.within(rows)
                objective = replace(part.objective, divergence=loss)
                result.append(replace(part, objective=objective, scale=part.scale * scale[rows]))
        return result
