"""DistiLLM-2's adaptive alpha: the closer the student, the larger its skew. n rows, s sequences."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import distributed as dist

from selectkd.errors import ConfigError
from selectkd.loss.terms import Forward, Term
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.registry import name_in, unbound

SIGN = {"skew_kl": 1.0, "skew_reverse_kl": -1.0}
"""The gap of skew_kl is P - Q (text of the teacher's), of skew_reverse_kl Q - P (text of the student's)."""


@dataclass
class adaptive_alpha:
    """alpha = clip(1 - (1 - start) M / (gap + 1e-5), floor, start) for each sequence under a skew divergence.

    gap = P - Q under skew_kl and Q - P under skew_reverse_kl, P and Q the geometric means of the token probabilities of
    the sequence under teacher and student, over all its trained tokens. M is the mean gap over the first ``window``
    optimizer steps, in which alpha is ``start``; over all ranks. A gap that is not positive gives ``start``, as of a
    student that is close. Defaults start .1 and floor .01 as in the paper.
    Source: DistiLLM-2 (arXiv 2503.07067). window 10 is ours: the paper's is the first one that was logged.
    """

    start: float = 0.1
    floor: float = 0.01
    window: int = 10
    sums: dict[str, list[float]] = field(default_factory=dict, init=False)  # of gap and sequences
    anchor: dict[str, float] = field(default_factory=dict, init=False)
    last: dict[str, float] = field(default_factory=dict, init=False)  # the mean alpha of the last micro-batch

    def __post_init__(self) -> None:
        if not 0.0 < self.floor <= self.start <= 1.0 or self.window < 1:
            raise ConfigError(
                f"adaptive_alpha(start={self.start}, floor={self.floor}, window={self.window}): "
                "0 < floor <= start <= 1 and window of 1 step or more."
            )
        self.sums = {name: [0.0, 0.0] for name in SIGN}

    def __call__(self, forward: Forward, terms: list[Term], *, step: int) -> list[Term]:
        if step >= self.window and not self.anchor:
            self._settle(forward.hidden.device)
        result: list[Term] = []
        found: dict[str, dict[int, float]] = {}  # the gap of each sequence, however many terms have its rows
        for term in terms:
            name = name_in(DIVERGENCES, term.objective.divergence)
            sequence = term.of(forward.sequence)
            if name is None or name not in SIGN or not sequence.numel():
                result.append(term)
                continue
            gap, gaps = self._gaps(forward), found.setdefault(name, {})
            _, params = unbound(term.objective.divergence)
            for one in sequence.unique().tolist():
                gaps[one] = SIGN[name] * gap[one]
                loss = {**params, "name": name, "alpha": self.alpha(name, gaps[one])}
                part = term.within((sequence == one).nonzero()[:, 0])
                result.append(replace(part, objective=replace(part.objective, divergence=loss)))
        for name, gaps in found.items():
            self.last[name] = sum(self.alpha(name, gap) for gap in gaps.values()) / len(gaps)
            if step < self.window:
                total = self.sums[name]
                total[0] += sum(gaps.values())
                total[1] += len(gaps)
        return result

    def alpha(self, name: str, gap: float) -> float:
        """alpha of a sequence with this gap, under ``name``."""
        anchor = self.anchor.get(name)
        if anchor is None:
            return self.start
        if gap <= 0.0:
            return self.start
        return min(max(1.0 - (1.0 - self.start) * anchor / (gap + 1e-5), self.floor), self.start)

    @staticmethod
    def _gaps(forward: Forward) -> dict[int, float]:
        """P - Q of each sequence over all its rows, whichever of them a selector keeps."""
        which, place = forward.sequence.unique(return_inverse=True)
        labels = forward.seen_label_log_probs
        known = ~labels.isnan().any(-1)  # rows whose teacher is finite
        length = torch.zeros_like(which).index_add_(0, place, known.to(which.dtype))
        mean = torch.zeros(which.shape[0], 2, dtype=labels.dtype, device=labels.device)
        mean = mean.index_add_(0, place, labels.nan_to_num(nan=0.0)) / length.clamp(min=1)[:, None]
        p, q = mean.exp().unbind(-1)
        return dict(zip(which.tolist(), (p - q).tolist(), strict=True))

    def _settle(self, device: torch.device) -> None:
        """The anchor from the sums of the window, over all ranks."""
        total = torch.tensor([self.sums[name] for name in SIGN], dtype=torch.float64, device=device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(total)
        self.anchor = {
            name: gap / count for name, (gap, count) in zip(SIGN, total.tolist(), strict=True) if count
        }

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as plain data."""
        return {"sums": {name: list(value) for name, value in self.sums.items()}, "anchor": dict(self.anchor)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums = {name: list(state["sums"][name]) for name in SIGN}
        self.anchor = dict(state["anchor"])
