"""The shadow panel: every verifier and selector on the same rows in one pass, without training anybody. n rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.data.supervised import supervised
from selectkd.errors import DataError
from selectkd.loss.options import LossOptions
from selectkd.loss.terms import Forward
from selectkd.models.forward import evaluating, hidden_rows
from selectkd.models.head import head_of
from selectkd.objective.divergences import forward_kl
from selectkd.objective.pair import TokenPair, entropy
from selectkd.objective.registry import build
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS, VerifierTraits, traits_of
from selectkd.teachers.protocol import Teacher
from selectkd.training.heldout.breakdown import ENTROPIES, POSITIONS, binned
from selectkd.training.uniforms_of_text import draws

OWN = 3
"""Columns the panel measures itself: KL(p || q), the norm of its gradient, the teacher's entropy."""


def gates(names: Mapping[str, Any] | None = None, *, reference: bool = False) -> dict[str, Any]:
    """name -> verifier or selector: those of ``names`` (name -> spec), else every one of both tables at its defaults.

    Of all, ``always`` keeps everything and is left out, and those that compare with a reference student are where there
    is one.
    """
    table = {**VERIFIERS, **SELECTORS}
    if names is not None:
        return {name: build(table, spec, kind="verifier or selector") for name, spec in names.items()}
    every = {name: build(table, name, kind="verifier or selector") for name in table if name != "always"}
    return {name: one for name, one in every.items() if reference or not traits_of(one).needs_reference}


@dataclass
class _Panel:
    """All gates as one selector: its score is every gate's columns side by side, its keep hands them over.

    widths: how many columns the score of each had, known once there was one.
    """

    members: Mapping[str, Any]
    widths: list[int] = field(default_factory=list)

    @property
    def traits(self) -> VerifierTraits:
        columns = sum(traits_of(one).uniforms_per_token for one in self.members.values())
        return VerifierTraits(uniforms_per_token=columns, scope="step")

    def score(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        """[n, OWN + columns]: the panel's own measures, then each gate's acceptance or scores."""
        gradient = (pair.logq.exp() - pair.logp.exp()).square().sum(-1).sqrt()
        columns = [torch.stack([forward_kl(pair.logp, pair.logq), gradient, entropy(pair.logp)], -1)]
        start = 0
        self.widths = []
        for one in self.members.values():
            traits = traits_of(one)
            own = uniform[:, start : start + traits.uniforms_per_token]
            start += traits.uniforms_per_token
            seen = one.score(pair, own) if traits.ranks else one(pair, own)[:, None]
            columns.append(seen.to(columns[0].dtype))
            self.widths.append(seen.shape[1])
        return torch.cat(columns, -1)

    def keep(self, scores: Tensor, sequence: Tensor) -> Tensor:
        return scores

    def __call__(self, pair: TokenPair, uniform: Tensor) -> Tensor:
        return self.score(pair, uniform)


@torch.no_grad()
def panel(
    student: nn.Module,
    teacher: Teacher,
    batches: Iterable[Any],
    members: Mapping[str, Any],
    *,
    beta: float = 0.01,
    verify_temperature: float = 1.0,
    seed: int = 0,
    chunk: int | None = None,
) -> dict[str, Any]:
    """What every gate would do with the same rows: {n, beta, gates: {name: {...}}, jaccard: {name: {name: x}}}.

    Of a gate: ``rate``, the mean acceptance; ``loss_removed`` and ``gradient_removed``, 1 - sum V D / sum D with
    V = beta + (1 - beta) a, D the forward KL and, for the gradient, the norm |q - p| of its gradient to the row's
    logits; the rate by place in the completion and by the teacher's entropy in nats. jaccard: sum min(a, b) / sum
    max(a, b) of two acceptances, the overlap of two sets where they are 0 and 1. A ranked gate ranks each batch, as in
    training. Gates judge both models at verify_temperature; D, its gradient and the entropy are those at temperature
    1. The student keeps its mode. Raises DataError where no row is trained.
    """
    member = _Panel(members)
    accepted: dict[str, list[Tensor]] = {name: [] for name in members}
    own, places = list[Tensor](), list[Tensor]()
    device = head_of(student).weight.device
    with evaluating(student):
        for batch in batches:
            batch = batch.to(device)
            seen = supervised(batch)
            if not seen.position.shape[0]:
                continue
            here = _forward(student, teacher, batch, seen, member, seed, chunk)
            scores = here.scores(member, temperature=verify_temperature)
            plain = scores if verify_temperature == 1.0 else here.scores(_Panel({}))
            own.append(plain[:, :OWN].double().cpu())
            places.append(seen.offset.cpu())
            for name, acceptance in _kept(member, scores, seen.sequence):
                accepted[name].append(acceptance.double().cpu())
    if not own:
        raise DataError("no token of the text is trained, so there is nothing to compare.")
    kl, gradient, surprise = torch.cat(own).T.contiguous()
    place = torch.cat(places)
    verdicts = {name: torch.cat(parts) for name, parts in accepted.items()}
    return {
        "n": int(kl.shape[0]),
        "beta": beta,
        "gates": {
            name: {
                "rate": float(a.mean()),
                "loss_removed": _removed(a, kl, beta),
                "gradient_removed": _removed(a, gradient, beta),
                "by_position": binned(a, place, POSITIONS),
                "by_entropy": binned(a, surprise, ENTROPIES),
            }
            for name, a in verdicts.items()
        },
        "jaccard": {
            name: {other: jaccard(a, b) for other, b in verdicts.items() if other != name}
            for name, a in verdicts.items()
        },
    }


def jaccard(a: Tensor, b: Tensor) -> float:
    """sum min(a, b) / sum max(a, b) of two acceptances [n], 1 where both are 0 everywhere.

    >>> jaccard(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0, 1.0]))
    0.3333333333333333
    """
    union = float(torch.maximum(a, b).sum())
    return float(torch.minimum(a, b).sum()) / union if union else 1.0


def _forward(
    student: nn.Module, teacher: Teacher, batch: Any, seen: Any, member: _Panel, seed: int, chunk: int | None
) -> Forward:
    hidden = hidden_rows(student, batch, seen.position)  # [n, d]
    rows = teacher(batch, seen.position)
    uniform = draws(batch, seen, member.traits.uniforms_per_token, seed=seed, step=0)
    return Forward(
        hidden,
        head_of(student),
        rows,
        seen.labels,
        seen.sequence,
        seen.stream,
        uniform,
        LossOptions(chunk=chunk),
    )


def _kept(member: _Panel, scores: Tensor, sequence: Tensor) -> Iterable[tuple[str, Tensor]]:
    """Each gate's acceptance of the rows of a batch, from the columns that are its own."""
    start = OWN
    for (name, one), width in zip(member.members.items(), member.widths, strict=True):
        columns = scores[:, start : start + width]
        start += width
        yield name, one.keep(columns, sequence) if traits_of(one).ranks else columns[:, 0]


def _removed(acceptance: Tensor, amount: Tensor, beta: float) -> float:
    total = float(amount.sum())
    return 1.0 - float(((beta + (1.0 - beta) * acceptance) * amount).sum()) / total if total else 0.0
