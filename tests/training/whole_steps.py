"""Features of one optimizer step, two by two: a matrix in which every value of one meets every value of another.

``test_whole_steps`` compares each case with the plain program; as a program of its own this file runs those of two
ranks on one of them and writes what they gave.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from selectkd.data.collate import collate_packed, pack
from selectkd.loss.extras import EXTRAS
from selectkd.loss.options import LossOptions
from selectkd.loss.plan import StreamSpec
from selectkd.loss.teacher_rows import LiveRows
from selectkd.objective.objective import Objective
from selectkd.objective.registry import parameters
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS
from selectkd.teachers import LiveTeacher
from selectkd.training.counts import REDUCTIONS
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from training.plain_step import Stream
from training.tiny import padded, texts, tiny_llama

FEATURES: Mapping[str, Sequence[Any]] = {
    "judge": (*VERIFIERS, *SELECTORS),
    "extra": (None, *EXTRAS),
    "models": ("plain", "unshared", "forbids", "faulty"),
    "divergence": ("forward_kl", "skew_kl", "reverse_kl", "skew_reverse_kl"),
    "reduction": REDUCTIONS,
    "selector": (None, "tip", "rho_1"),
    "micro": ("whole", "eighths", "packed"),
    "rejected": ("weigh", "count nothing", "are thinned"),
    "temperatures": ((1.0, 1.0), (2.0, 1.0), (1.0, 1.5)),
    "language_model": (0.0, 0.5),
    "sources": (1, 2),
    "ranks": (1, 2),
}
"""What meets what. unshared: ids that one side alone has, logits about -30,000, a reference of fewer ids; forbids: a
bias of -inf; faulty: rows of the teacher that are nan."""
METRICS = ("tar", "weight", "kl", "kl of a", "kl of b")
FORBIDDEN, SHARED, READ_BADLY = 7, 58, 13
TEXTS = [replace(one, input_ids=[8 + i % 50 for i in one.input_ids]) for one in texts(8, seed=3)]


def matrix(features: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Cases in which each pair of values of two features stands at least once; the same ones every time."""
    names = list(features)
    open_pairs = {
        frozenset([(a, x), (b, y)]): None
        for a, b in itertools.combinations(names, 2)
        for x in range(len(features[a]))
        for y in range(len(features[b]))
    }
    cases = []
    while open_pairs:
        case = dict(next(iter(open_pairs)))
        for name in names:
            turn = len(cases) % len(features[name])
            values = [*range(turn, len(features[name])), *range(turn)]
            gained = {
                x: sum(frozenset([(name, x), other]) in open_pairs for other in case.items()) for x in values
            }
            case.setdefault(name, max(values, key=gained.__getitem__))
        for pair in itertools.combinations(case.items(), 2):
            open_pairs.pop(frozenset(pair), None)
        cases.append({name: features[name][case[name]] for name in names})
    return cases


@dataclass(frozen=True)
class Case:
    """A case of the matrix, and what it means for the plain program."""

    judge: str
    extra: str | None
    models: str
    divergence: str
    reduction: str
    selector: str | None
    micro: str
    rejected: str
    temperatures: tuple[float, float]
    language_model: float
    sources: int
    ranks: int
    k: int = 9  # which rejects some rows of the tiny pair
    start: float = 0.9  # adaptive alpha's, and the anchor of a window that is over
    anchor: float = 0.01
    always_accept: tuple[int, ...] = (11, 12)

    @property
    def name(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in FEATURES)

    @property
    def temperature(self) -> float:
        return self.temperatures[0]

    @property
    def verify_temperature(self) -> float:
        return self.temperatures[1]

    @property
    def thins(self) -> bool:
        return self.rejected == "are thinned" and self.judge not in ("iw_opd", "fire")  # weights above 1

    @property
    def streams(self) -> list[Stream]:
        beta = 0.0 if self.rejected == "count nothing" else 0.1
        made = [Stream(self.divergence, beta, 1.0, self.selector, self.language_model)]
        return made + [Stream("reverse_kl", 0.3, 2.0, None, 0.0)] * (self.sources - 1)

    def ledger(self) -> Ledger:
        first, *others = self.streams
        judge = {**VERIFIERS, **SELECTORS}[self.judge]
        objective = Objective(
            first.divergence,
            judge(k=self.k) if "k" in parameters(judge) else judge(),
            first.beta,
            always_accept=self.always_accept,
            verify_temperature=self.verify_temperature,
            thin_rejected=self.thins,
        )
        selector = None if first.selector is None else SELECTORS[first.selector]()
        losses = [StreamSpec(selector=selector, language_model=first.language_model)]
        losses += [
            StreamSpec(one.divergence, beta=one.beta, weight=(one.weight, one.weight, 1.0)) for one in others
        ]
        extra: Any = None if self.extra is None else EXTRAS[self.extra]()
        if self.extra == "adaptive_alpha":  # as if its window were over
            extra = EXTRAS[self.extra](start=self.start, window=1)
            extra.anchor = {"skew_kl": self.anchor, "skew_reverse_kl": self.anchor}
        made = Ledger(
            objective, self.reduction, streams=("a", "b"), losses=losses, extras=[extra] if extra else []
        )
        made.step = 1
        return made

    def batches(self) -> list[Any]:
        if self.micro == "packed":
            return [collate_packed(pack(half, 48), pad_id=0) for half in (TEXTS[:4], TEXTS[4:])]
        return padded(TEXTS, {"whole": 8 // self.ranks, "eighths": 1}[self.micro])


CASES = [Case(**one) for one in matrix(FEATURES)]


class Faulty(LiveTeacher):
    """A teacher whose rows are nan behind some tokens."""

    def __call__(self, batch: Any, position: Tensor) -> LiveRows:
        rows = super().__call__(batch, position)
        rows.hidden[batch.input_ids.flatten()[position] % READ_BADLY == 0] = torch.nan
        return rows


@cache
def models(kind: str) -> tuple[nn.Module, LiveTeacher, LiveTeacher]:
    """(student, teacher, reference) in fp64: two rows as good as equal in fp32 would rank differently by batch."""
    student, teacher, reference = (
        tiny_llama(seed, layers=1, hidden=16, dtype=torch.float64) for seed in (2, 1, 5)
    )
    shared = None
    if kind == "unshared":
        shared = torch.arange(student.config.vocab_size) < SHARED
        reference.resize_token_embeddings(SHARED + 1)
    for model in (student, teacher, reference):
        head = model.get_output_embeddings()
        bias = torch.full((head.weight.shape[0],), -3e4 if kind == "unshared" else 0.0, dtype=torch.float64)
        if kind == "forbids":
            bias[FORBIDDEN] = 2.0 if model is teacher else -torch.inf
        head.bias = None if kind in ("plain", "faulty") else nn.Parameter(bias)
    held = LiveTeacher(reference, shared=shared)
    return (
        student,
        (Faulty if kind == "faulty" else LiveTeacher)(teacher, shared=shared, reference=held),
        held,
    )


@cache
def _losses(kind: str) -> DistillationModel:
    student, teacher, _ = models(kind)
    return DistillationModel(student, teacher, options=LossOptions(also_kl=True)).train()


def loss_of(case: Case) -> tuple[nn.Module, DistillationModel]:
    """(student, its loss)."""
    made = _losses(case.models)
    made.options = replace(made.options, temperature=case.temperature)
    return made.student, made


def step_of(case: Case, micro: Sequence[Any], student: nn.Module, model: nn.Module) -> Tensor:
    """Loss, metrics and the whole gradient of one optimizer step, one vector."""
    book = case.ledger()
    student.zero_grad(set_to_none=True)

    @torch.no_grad()
    def ask(micro_batch: Any, first: Any) -> Any:
        return model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, first)

    for micro_batch in book.begin(micro, ask):
        apart = hasattr(model, "no_sync") and not micro_batch.last
        with model.no_sync() if apart else contextlib.nullcontext():  # type: ignore[operator]
            loss, sums = model(
                micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, micro_batch.plan
            )
            loss.backward()
        book.add(micro_batch, loss, sums)
    book.reduce(student.parameters())
    assert book.close_step(1.0)
    line = book.line()
    of_source = {f"kl of {name}": rates["kl"] for name, rates in line["streams"].items()}
    return vector(line["loss"], {**line, **of_source}, student)


def vector(loss: Any, metrics: Mapping[str, Any], student: nn.Module) -> Tensor:
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in student.parameters()]
    numbers = [
        torch.as_tensor(one, dtype=torch.float64) for one in (loss, *(metrics[name] for name in METRICS))
    ]
    return torch.cat([torch.stack(numbers), *(one.flatten() for one in gradients)]).detach()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found, wrapped = {}, {}
    for case in CASES:
        if case.ranks == 2:
            student, own = loss_of(case)
            if case.models not in wrapped:
                wrapped[case.models] = DistributedDataParallel(own, find_unused_parameters=True)
            batches = case.batches()
            micro = next(BatchFeed(lambda epoch, batches=batches: batches).steps(len(batches) // 2))
            found[case.name] = step_of(case, micro, student, wrapped[case.models])
    del wrapped
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    save_file(found, folder / f"{dist.get_rank()}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
