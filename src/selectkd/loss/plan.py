"""What a step's loss is made of: an objective for each stream, and the extras that change its terms. n rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from selectkd.loss.head import wide
from selectkd.loss.ranking import Contest, Kept, decided
from selectkd.loss.teacher_rows import TeacherRows
from selectkd.loss.terms import Forward, Term, weighted_sum
from selectkd.objective.objective import Objective
from selectkd.objective.verifiers import traits_of


@runtime_checkable
class Extra(Protocol):
    """Changes the terms of optimizer step ``step`` (from 0): splits them, scales them, or adds to them.

    One that ranks the rows of the step has ``score(forward) -> [n, m]`` and ``keep(scores, sequence)`` as a selector
    does, and is handed what ``keep`` gave its rows as ``standing``.
    """

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
    """The losses of the streams by number (one alone is every stream's), the extras, and the optimizer step.

    What a first pass over the step has found for the rows of one batch: kept, what each contest decided; teacher, the
    teacher's rows. None: rows are ranked within the batch, in ``order`` where ties have one. beside: the factor of the
    language-modelling losses that undoes what the reduction does to the objective.
    """

    streams: tuple[StreamLoss, ...]
    extras: Sequence[Extra] = ()
    step: int = 0
    kept: Kept | None = None
    order: Tensor | None = None
    teacher: TeacherRows | None = None
    beside: Tensor | None = None

    @classmethod
    def of(cls, objective: Objective | LossPlan) -> LossPlan:
        """The plan itself, or one objective for every row."""
        return objective if isinstance(objective, LossPlan) else cls((StreamLoss(objective),))

    @property
    def uniforms_per_token(self) -> int:
        """Columns of uniform numbers the widest objective or selector reads."""
        needs = [stream.objective.uniforms_per_token for stream in self.streams]
        return max(
            needs + [traits_of(one.selector).uniforms_per_token for one in self.streams if one.selector]
        )

    @property
    def contests(self) -> list[Contest]:
        """Everything that ranks rows, a stream's selector before its verifier."""
        found = []
        for number, stream in enumerate(self.streams):
            of, apart = None if len(self.streams) == 1 else number, None
            temperature = stream.objective.verify_temperature
            if stream.selector is not None:
                apart = ("selector", number)
                found.append(Contest(apart, stream.selector, of, temperature))
            if stream.objective.ranks_the_batch:
                gate = stream.objective.verifier
                found.append(Contest(("verifier", number), gate, of, temperature, apart))
        extras = enumerate(self.extras)
        return found + [Contest(("extra", number), one) for number, one in extras if traits_of(one).ranks]

    @property
    def models_language(self) -> bool:
        """Whether a language-modelling loss stands beside the objective."""
        return any(stream.language_model > 0 for stream in self.streams)

    def _decided(self, forward: Forward) -> Kept:
        kept, contests = self.kept, self.contests
        if kept is None:
            scores = [contest.scores(forward) for contest in contests]
            kept = decided(
                contests, scores, stream=forward.stream, sequence=forward.sequence, order=self.order
            )
        fp = wide(forward.head.weight.dtype)
        return {key: values.to(fp) for key, values in kept.items()}

    def terms(self, forward: Forward) -> list[Term]:
        """The terms of a forward pass; each row is in one that is not ``beside``."""
        terms: list[Term] = []
        kept = self._decided(forward)
        for number, stream in enumerate(self.streams):
            rows = None if len(self.streams) == 1 else forward.rows_of(number)
            if rows is not None and not rows.numel():
                continue
            verdicts = kept.get(("verifier", number))
            if verdicts is not None and rows is not None:
                verdicts = verdicts[rows]
            term = Term(stream.objective, rows, stream.weight, weighs=stream.weight > 0, acceptance=verdicts)
            chosen = kept.get(("selector", number))
            terms += [term] if chosen is None else _split(term, term.of(chosen) > 0)
        for number, extra in enumerate(self.extras):
            standing = kept.get(("extra", number))
            given = {} if standing is None else {"standing": standing}
            terms = extra(forward, terms, step=self.step, **given)
        return terms + self._language_model(forward)

    def _language_model(self, forward: Forward) -> list[Term]:
        terms = []
        for number, stream in enumerate(self.streams):
            if stream.language_model > 0:
                rows = None if len(self.streams) == 1 else forward.rows_of(number)
                scale: float | Tensor = stream.language_model
                if self.beside is not None:
                    of = forward.labels if rows is None else rows
                    scale = (self.beside * scale).expand(of.shape[0])
                terms.append(Term(LABELS, rows, scale, beside=True, alone=True))
        return terms


LABELS = Objective("cross_entropy", "always", beta=1.0)
"""The language-modelling loss: cross-entropy of every token, gated by nothing."""


def _split(term: Term, kept: Tensor) -> list[Term]:
    """The rows of a term that a selector keeps, and the others, which count nothing."""
    return [
        term.within(kept.nonzero()[:, 0]),
        term.within((~kept).nonzero()[:, 0], weighs=False),
    ]


@dataclass
class FirstPass:
    """What a model is asked for in place of its loss where a step must know of all its rows first.

    weighs: the sum of the objective's weights [1]; else the scores of each contest. teacher: its rows, which the model
    leaves here, so that it asks for them once.
    """

    plan: LossPlan
    weighs: bool = False
    teacher: TeacherRows | None = None

    @torch.no_grad()
    def __call__(self, forward: Forward, row_scale: Tensor) -> list[Tensor]:
        if not self.weighs:
            return [contest.scores(forward) for contest in self.plan.contests]
        plain = replace(self.plan, extras=())  # none of them changes a weight
        terms = [term for term in plain.terms(forward) if not term.beside]
        return [weighted_sum(terms, forward, row_scale)[1]["weight"].reshape(1)]
