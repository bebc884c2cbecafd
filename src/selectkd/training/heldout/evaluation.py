"""Held-out measures of a student beside its teacher. n supervised rows, c rows of a chunk, v vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.data.supervised import supervised
from selectkd.loss.distillation import distillation_loss
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import LiveRows
from selectkd.loss.token_log_probs import token_log_probs
from selectkd.models.forward import evaluating, hidden_rows
from selectkd.models.head import head_of
from selectkd.models.precision import FP32, Precision
from selectkd.models.sharded import inside
from selectkd.objective.objective import Objective
from selectkd.teachers.protocol import Teacher
from selectkd.training.counts import over_ranks, rank, ranks
from selectkd.training.first_pass import MicroBatch
from selectkd.training.sums import FIELDS, named, rates, step_sums, stream_rates, zeros
from selectkd.training.uniforms_of_text import draws


@dataclass(frozen=True)
class Evaluation:
    """What held-out text says: ``kl`` is KL(p || q) in nats a token at temperature 1, whatever the objective.

    perplexity, teacher_perplexity: of the text's own tokens. tar, acceptance (mean over tokens), bite (of the
    KL), overlap (mean of sum_v min(p, q)): at the objective's verifier and beta, where a run gives the beta it
    ends with. streams: tar and kl of each stream. unverified: the share of tokens without a verdict; not 0 beside a
    teacher of another tokenizer alone, where kl is GOLD's loss with forward_kl and teacher_perplexity is not known.
    """

    kl: float
    perplexity: float
    teacher_perplexity: float | None
    tar: float
    acceptance: float
    bite: float
    overlap: float
    tokens: int
    sequences: int
    streams: dict[str, dict[str, float | None]]
    unverified: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    student: nn.Module,
    teacher: Teacher,
    batches: Iterable[Any],
    objective: Objective,
    *,
    seed: int = 0,
    streams: Sequence[str] = ("data",),
    chunk: int | None = None,
    precision: Precision = FP32,
) -> Evaluation:
    """Measures ``student`` on ``batches``, on its own device; its mode is put back afterwards.

    The same text gives the same numbers. Of several ranks each measures its part of the batches, and all get the
    numbers of all: a collective call.
    """
    # every row is measured, at its own weight: to thin them out is for training alone
    measured = replace(objective, divergence="forward_kl", thin_rejected=False)
    total = zeros(len(streams))
    surprise = torch.zeros(2, dtype=torch.float64)  # of student and teacher
    device = head_of(student).weight.device
    with evaluating(student):
        for batch, counts in _of_this_rank(batches):
            batch = batch.to(device)
            rows = supervised(batch)
            if not len(rows) and ranks() == 1:
                continue
            one = _measured(student, teacher, batch, measured, seed=seed, chunk=chunk, precision=precision)
            if not counts or not len(rows):
                continue
            sums = {**one.sums, "kl": one.sums["divergence"], "row_kl": one.sums["row_divergence"]}
            micro = MicroBatch(batch, rows, torch.empty(0), torch.empty(0), last=True)
            total += step_sums(micro, one.loss, sums, streams=len(streams)).cpu()
            surprise += torch.tensor([_sum(rows) for rows in one.surprise], dtype=torch.float64)
    total, surprise = over_ranks(torch.cat([total, surprise])).split([len(total), 2])
    sums, n = named(total), float(total[FIELDS.index("n")])
    measures = {name: math.nan if value is None else value for name, value in rates(sums).items()}
    mean = [float(value) / n if n else math.nan for value in surprise]
    return Evaluation(
        kl=measures["kl"],
        perplexity=_exp(mean[0]),
        teacher_perplexity=None if math.isnan(mean[1]) else _exp(mean[1]),
        tar=measures["tar"],
        acceptance=measures["acceptance"],
        bite=measures["bite"],
        overlap=measures["overlap"],
        tokens=int(n),
        sequences=int(sums["sequences"]),
        streams=stream_rates(total, streams),
        unverified=measures["unverified"],
    )


@torch.no_grad()
def evaluate_each(
    student: nn.Module,
    teacher: Teacher,
    batches: Iterable[Any],
    objective: Objective,
    *,
    seed: int = 0,
    streams: Sequence[str] = ("data",),
    precision: Precision = FP32,
) -> list[Evaluation]:
    """``evaluate`` of every sequence of the batches alone, in order, from one forward pass a batch; a sequence without
    trained tokens is left out. objective: of a gate that ranks no rows. On one process.
    """
    measured = replace(objective, divergence="forward_kl", thin_rejected=False)
    device, found = head_of(student).weight.device, list[Evaluation]()
    with evaluating(student):
        for batch in batches:
            batch = batch.to(device)
            rows = supervised(batch)
            if not len(rows):
                continue
            one = _measured(student, teacher, batch, measured, seed=seed, chunk=None, precision=precision)
            for sequence in rows.there.tolist():
                own = rows.sequence == sequence
                found.append(_of_sequence(one, own, streams[int(batch.stream[sequence])]))
    return found


def _of_sequence(one: _Measured, own: Tensor, stream: str) -> Evaluation:
    """The evaluation of the rows ``own`` [n] of a batch, which are one sequence of a stream."""
    means = {
        name: float(one.sums[f"row_{name}"][own].double().mean())
        for name in ("divergence", "acceptance", "overlap", "unverified")
    }
    weighted = float((one.sums["row_weight"][own].double() * one.sums["row_divergence"][own].double()).mean())
    kl, tar = means["divergence"], means["acceptance"]
    mean = [math.nan if rows is None else float(rows[own].mean()) for rows in one.surprise]
    return Evaluation(
        kl=kl,
        perplexity=_exp(mean[0]),
        teacher_perplexity=None if math.isnan(mean[1]) else _exp(mean[1]),
        tar=tar,
        acceptance=tar,
        bite=1.0 - weighted / kl if kl else 0.0,
        overlap=means["overlap"],
        tokens=int(own.sum()),
        sequences=1,
        streams={stream: {"tar": tar, "kl": kl, "divergence": kl}},
        unverified=means["unverified"],
    )


def _sum(rows: Tensor | None) -> float:
    return math.nan if rows is None else float(rows.sum())


def _of_this_rank(batches: Iterable[Any]) -> Iterator[tuple[Any, bool]]:
    """(batch, whether it counts) of this rank. A sharded student runs on all ranks at once, so all have as many: where
    they do not come out even, some ranks run the last batch again, uncounted.
    """
    if ranks() == 1:
        yield from ((batch, True) for batch in batches)
        return
    whole = batches if isinstance(batches, Sequence) else list(batches)
    for start in range(0, len(whole), ranks()):
        own = start + rank()
        yield whole[min(own, len(whole) - 1)], own < len(whole)


@dataclass(frozen=True)
class _Measured:
    """The loss and sums of a batch; surprise: -log of its own tokens' probability, [n] in fp64, by student and by
    teacher; None where it was not asked for, or the teacher's rows do not say.
    """

    loss: Tensor
    sums: dict[str, Tensor]
    surprise: tuple[Tensor | None, Tensor | None]


def _measured(
    student: nn.Module,
    teacher: Teacher,
    batch: Any,
    objective: Objective,
    *,
    seed: int,
    chunk: int | None,
    precision: Precision,
    surprise: bool = True,
) -> _Measured:
    rows = supervised(batch)
    uniform = draws(batch, rows, objective.uniforms_per_token, seed=seed, step=0)

    def measure() -> _Measured:
        head = head_of(student)
        with precision.autocast(batch.input_ids.device):
            hidden = hidden_rows(student, batch, rows.position)  # [n, d]
        of_teacher = teacher(batch, rows.position)
        by_student = by_teacher = None
        with precision.autocast(hidden.device):
            loss, sums = distillation_loss(
                hidden, head, of_teacher, objective, uniform, chunk=chunk, labels=rows.labels,
                sequence=rows.sequence,
            )  # fmt: skip
            if surprise:
                by_student = -token_log_probs(hidden, head, rows.labels, chunk=chunk).double()
        if surprise and isinstance(of_teacher, LiveRows):
            by_teacher = -token_log_probs(
                of_teacher.hidden, of_teacher.head, rows.labels, chunk=chunk
            ).double()
        return _Measured(loss, sums, (by_student, by_teacher))

    return inside(student, measure)


@torch.no_grad()
def negative_log_likelihood(hidden: Tensor, head: Head, labels: Tensor, *, chunk: int | None = None) -> float:
    """The sum of -log of the probability the head gives each label, in nats, over its whole vocabulary."""
    return -float(token_log_probs(hidden, head, labels, chunk=chunk).sum())


@torch.no_grad()
def probe(
    student: nn.Module,
    teacher: Teacher,
    batch: Any,
    objective: Objective,
    *,
    seed: int = 0,
    chunk: int | None = None,
    precision: Precision = FP32,
) -> Tensor:
    """The acceptance of each row of one fixed batch, [n], from the same uniform numbers every time."""
    with evaluating(student):
        one = _measured(
            student, teacher, batch, objective, seed=seed, chunk=chunk, precision=precision, surprise=False
        )
    return one.sums["row_acceptance"]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
