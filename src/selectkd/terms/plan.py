"""What a step's loss is made of: an objective for each stream, and the extras that change its terms. n rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch

from selectkd.objective import Objective
from selectkd.terms.term import Forward, Term
from selectkd.verifiers import uniforms_of


@runtime_checkable
class Extra(Protocol):
    """Changes the terms of optimizer step ``step`` (from 0): splits them, scales them, or adds to them."""

    def __call__(self, forward: Forward, terms: list[Term], *, step: int) -> list[Term]: ...


@dataclass(frozen=True)
class StreamLoss:
    """What the rows of one stream cost. selector: keeps the rows that the objective's verifier then weighs; the
    others count nothing. weight: factor of the loss, 0 for a stream that is only measured. language_model: factor of
    an ungated cross-entropy on its text.
    """

    objective: Objective
    selector: Any = None
    weight: float = 1.0
    language_model: float = 0.0


@dataclass(frozen=True)
class StreamSpec:
    """A stream's loss before a step is known: what it changes of the run's objective of that step.

    divergence, verifier, beta: None where they are the run's own, which may change over steps. weight: (start, end,
    share): linearly over the first ``share`` of the run.
    """

    divergence: Any = None
    verifier: Any = None
    beta: float | None = None
    selector: Any = None
    weight: tuple[float, float, float] = (1.0, 1.0, 1.0)
    language_model: float = 0.0

    def at(self, objective: Objective, step: int, steps: int) -> StreamLoss:
        """The stream's loss at optimizer step ``step`` of ``steps``, ``objective`` being the run's at that step."""
        own = {"divergence": self.divergence, "verifier": self.verifier, "beta": self.beta}
        changed = {name: value for name, value in own.items() if value is not None}
        start, end, share = self.weight
        weight = start + (end - start) * min(1.0, step / (share * steps))
        return StreamLoss(
            replace(objective, **changed) if changed else objective,
            self.selector,
            weight,
            self.language_model,
        )

    def objectives_on(self, objective: Objective) -> list[Objective]:
        """The stream's objective at the start of a run, and one with its selector for a verifier, for checks."""
        own = self.at(objective, 0, 1).objective
        return [own] if self.selector is None else [own, replace(own, verifier=self.selector)]


@dataclass(frozen=True)
class LossPlan:
    """The losses of the streams by number (one alone is every stream's), the extras, and the optimizer step."""

    streams: tuple[StreamLoss, ...]
    extras: Sequence[Extra] = ()
    step: int = 0

    @classmethod
    def of(cls, objective: Objective | LossPlan) -> LossPlan:
        """The plan itself, or one objective for every row."""
        return objective if isinstance(objective, LossPlan) else cls((StreamLoss(objective),))

    @property
    def uniforms_per_token(self) -> int:
        """Columns of uniform numbers the widest objective or selector reads."""
        needs = [stream.objective.uniforms_per_token for stream in self.streams]
        return max(needs + [uniforms_of(stream.selector) for stream in self.streams if stream.selector])

    def terms(self, forward: Forward) -> list[Term]:
        """The terms of a forward pass; each row is in one that is not ``beside``."""
        terms: list[Term] = []
        for number, stream in enumerate(self.streams):
            rows = None if len(self.streams) == 1 else forward.rows_of(number)
            if rows is not None and not rows.numel():
                continue
            term = Term(stream.objective, rows, stream.weight, weighs=stream.weight > 0)
            terms += [term] if stream.selector is None else _split(term, stream.selector, forward)
        for extra in self.extras:
            terms = extra(forward, terms, step=self.step)
        return terms + self._language_model(forward)

    def _language_model(self, forward: Forward) -> list[Term]:
        terms = []
        for number, stream in enumerate(self.streams):
            if stream.language_model > 0:
                rows = None if len(self.streams) == 1 else forward.rows_of(number)
                terms.append(Term(LABELS, rows, stream.language_model, beside=True, alone=True))
        return terms


LABELS = Objective("cross_entropy", "always", beta=1.0)
"""The language-modelling loss: cross-entropy of every token, gated by nothing."""


def _split(term: Term, selector: Any, forward: Forward) -> list[Term]:
    """The rows of a term that a selector keeps, and the others, which count nothing."""
    part = forward if term.rows is None else taken(forward, term.rows)
    kept = part.scores(selector) > 0
    return [
        term.within(kept.nonzero()[:, 0]),
        term.within((~kept).nonzero()[:, 0], weighs=False),
    ]


def taken(forward: Forward, rows: torch.Tensor) -> Forward:
    """Some rows of a forward pass."""
    return Forward(
        forward.hidden[rows],
        forward.head,
        forward.teacher.take(rows),
        forward.labels[rows],
        forward.sequence[rows],
        forward.stream[rows],
        forward.uniform[rows],
        forward.temperature,
        forward.chunk,
    )
