"""ATKD: hard tokens learn the label's share and the rest, easy ones the rest alone. n rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

from selectkd.errors import ConfigError
from selectkd.terms.term import Forward, Term


@dataclass(frozen=True)
class atkd:
    """L = easy * mean NCKD(easy rows) + (1 - easy) * mean (TCKD + NCKD)(hard rows), the two of ``decoupled_kl``.

    A row is easy where u = 1 - p(label) lies below the median of its micro-batch. The mean over a half is written as a
    scale n / n_half on the mean over all, so that it goes with ``token_mean``; the objective's own divergence is not
    used. Default .2 as in the paper. Source: ATKD (arXiv 2402.11890).
    """

    easy: float = 0.2

    def __post_init__(self) -> None:
        if not 0.0 <= self.easy <= 1.0:
            raise ConfigError(f"atkd(easy={self.easy}): easy must lie in [0, 1].")

    def __call__(self, forward: Forward, terms: list[Term], *, step: int) -> list[Term]:
        surprise = 1.0 - forward.label_log_probs[:, 0].exp()  # [n]
        n = surprise.shape[0]
        if n == 0:
            return terms
        middle = surprise.sort().values[[(n - 1) // 2, n // 2]].mean()
        is_hard = surprise >= middle
        hard = float(is_hard.sum())
        result: list[Term] = []
        for term in terms:
            mine = term.of(is_hard)
            for rows, target, share in (
                (mine.nonzero()[:, 0], 1.0, (1.0 - self.easy) * n / max(hard, 1.0)),
                ((~mine).nonzero()[:, 0], 0.0, self.easy * n / max(n - hard, 1.0)),
            ):
                part = term.within(rows)
                loss = {"name": "decoupled_kl", "target": target, "rest": 1.0}
                result.append(
                    replace(
                        part, objective=replace(part.objective, divergence=loss), scale=part.scale * share
                    )
                )
        return result
