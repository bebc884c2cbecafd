"""Held-out measures of a student beside its teacher. n supervised rows, c rows of a chunk, v vocabulary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.data.supervised import supervised
from selectkd.loss.distillation import distillation_loss
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import LiveRows
from selectkd.loss.token_log_probs import token_log_probs
from selectkd.models.forward import last_hidden
from selectkd.models.head import head_of
from selectkd.models.precision import FP32, Precision
from selectkd.models.sharded import inside
from selectkd.objective.objective import Objective
from selectkd.teachers.protocol import Teacher
from selectkd.training.first_pass import Portion
from selectkd.training.ledger import FIELDS, STREAM_FIELDS, named, rates, step_sums, stream_rates
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
    device: torch.device | str | None = None,
    precision: Precision = FP32,
) -> Evaluation:
    """Measures ``student`` on ``batches``; its mode is put back afterwards. The same text gives the same
    numbers.
    """
    # every row is measured, at its own weight: to thin them out is for training alone
    measured = replace(objective, divergence="forward_kl", thin_rejected=False)
    was_training = student.training
    student.eval()
    total = torch.zeros(len(FIELDS) + len(streams) * len(STREAM_FIELDS), dtype=torch.float64)
    surprise = torch.zeros(2, dtype=torch.float64)  # of student and teacher
    try:
        for batch in batches:
            batch = batch if device is None else batch.to(device)
            seen = supervised(batch)
            if not seen.position.shape[0]:
                continue
            uniform = draws(batch, seen, measured.uniforms_per_token, seed=seed, step=0)
            look = partial(_measured, student, teacher, batch, seen, measured, uniform, chunk, precision)
            loss, sums, own = inside(student, look)
            sums["kl"], sums["row_kl"] = sums["divergence"], sums["row_divergence"]
            portion = Portion(batch, seen, torch.empty(0), uniform, last=True)
            total += step_sums(portion, loss, sums, streams=len(streams)).cpu()
            surprise += torch.tensor(own, dtype=torch.float64)
    finally:
        student.train(was_training)
    sums, n = named(total), float(total[FIELDS.index("n")])
    told = {name: math.nan if value is None else value for name, value in rates(sums).items()}
    mean = [float(value) / n if n else math.nan for value in surprise]
    return Evaluation(
        kl=told["kl"],
        perplexity=_exp(mean[0]),
        teacher_perplexity=None if math.isnan(mean[1]) else _exp(mean[1]),
        tar=told["tar"],
        acceptance=told["acceptance"],
        bite=told["bite"],
        overlap=told["overlap"],
        tokens=int(n),
        sequences=int(sums["sequences"]),
        streams=stream_rates(total, streams),
        unverified=told["unverified"],
    )


def _measured(
    student: nn.Module, teacher: Teacher, batch: Any, seen: Any, measured: Objective, uniform: Tensor,
    chunk: int | None, precision: Precision,
) -> tuple[Tensor, dict[str, Tensor], tuple[float, float]]:  # fmt: skip
    """(loss, sums, the surprise of student and teacher, NaN where the teacher's is not known) of a batch."""
    head = head_of(student)
    with precision.autocast(batch.input_ids.device):
        hidden = last_hidden(student, batch)  # [b, t, d]
    hidden = hidden.reshape(-1, hidden.shape[-1])[seen.position]  # [n, d]
    rows = teacher(batch, seen.position)
    with precision.autocast(hidden.device):
        loss, sums = distillation_loss(
            hidden, head, rows, measured, uniform, chunk=chunk, labels=seen.labels, sequence=seen.sequence
        )
        own = negative_log_likelihood(hidden, head, seen.labels, chunk=chunk)
    known = isinstance(rows, LiveRows)
    theirs = negative_log_likelihood(rows.hidden, rows.head, seen.labels, chunk=chunk) if known else math.nan
    return loss, sums, (own, theirs)


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
    seen = supervised(batch)
    was_training = student.training
    student.eval()
    try:
        uniform = draws(batch, seen, objective.uniforms_per_token, seed=seed, step=0)
        look = partial(_verdicts, student, teacher, batch, seen, objective, uniform, chunk, precision)
        return inside(student, look)
    finally:
        student.train(was_training)


def _verdicts(
    student: nn.Module, teacher: Teacher, batch: Any, seen: Any, objective: Objective, uniform: Tensor,
    chunk: int | None, precision: Precision,
) -> Tensor:  # fmt: skip
    head = head_of(student)
    with precision.autocast(batch.input_ids.device):
        hidden = last_hidden(student, batch)
    hidden = hidden.reshape(-1, hidden.shape[-1])[seen.position]
    rows = teacher(batch, seen.position)
    with precision.autocast(hidden.device):
        sums = distillation_loss(
            hidden, head, rows, objective, uniform, chunk=chunk, labels=seen.labels, sequence=seen.sequence
        )[1]
    return sums["row_acceptance"]


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
