"""Which chunks the kernels take, and how they are launched. c rows of a chunk, v vocabulary."""

# a kernel is launched by a subscript, which no type checker sees through
# pyright: reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOptionalSubscript=false
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from selectkd.loss.block_steps import BlockConfig, BlockInputs, BlockResult, statistics_of
from selectkd.loss.block_triton import passes
from selectkd.loss.block_triton.formulas import TERMS, of_alpha_beta
from selectkd.loss.block_triton.passes import FLOATS, INTS
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import LiveChunk
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.registry import name_in, unbound
from selectkd.objective.verifiers import RowStatistics

TILE, WARPS = 1024, 4
"""Columns a program holds at a time, and its warps: 8 columns a thread, loads of 16 bytes in bf16."""
PROGRAMS = 8
"""Programs a row's gradient is cut among, so that a few rows fill the device too."""
OVERLAP_FLOOR = 1.6458115e-38
"""e^-87, the floor of neg_log_acceptance's formula."""
FLAGS = {
    "student_top": "RANK", "token_rank": "RANK", "label_rank": "LABEL", "teacher_entropy": "ENTROPY",
    "student_entropy": "ENTROPY", "bhattacharyya": "BHATTACHARYYA",
}  # fmt: skip
"""The part of the kernel that takes a statistic; the overlap is always taken."""


class CannotLaunch(Exception):
    """The kernels cannot be built on this machine: no C compiler, a Triton that is too old, an unknown chip."""


def claims(config: BlockConfig, teacher: Any, *, ranked: bool = False) -> bool:
    """Whether the kernels do this work: a live teacher, a divergence with terms, and a verifier that reads statistics,
    or none to ask since a first pass has ``ranked`` the rows."""
    name, params = _named(config.objective.divergence)
    if not isinstance(teacher, LiveChunk) or name not in TERMS or teacher.raw.dtype == torch.float64:
        return False
    if config.head.weight.dtype == torch.float64:
        return False
    if name == "alpha_beta" and min(of_alpha_beta(params)) <= 0.0:
        return False  # a limit of the family: the closed form in block_eager.py has it
    if any(_forbids(head.bias) for head in (config.head, teacher.head)):
        return False  # what a bias forbids counts as e^-87, which block_eager.py knows
    return ranked or config.objective.reads_statistics


@torch.no_grad()
def evaluate_chunk(raw: Tensor, teacher: LiveChunk, rows: BlockInputs, config: BlockConfig) -> BlockResult:
    """A whole chunk; the gradient of the loss overwrites ``raw`` [c, v]. Equals ``evaluate_block``.

    Raises CannotLaunch, before anything is written, where the kernels cannot be built.
    """
    objective, temperature = config.objective, config.options.temperature
    other = objective.verify_temperature if rows.acceptance is None else temperature
    reads = () if rows.acceptance is not None else statistics_of(objective.verifier, rows)
    launch = _Launch(raw, teacher, rows, config)
    with _current(raw.device):
        kl_here = config.options.also_kl and temperature == 1.0
        table = launch.statistics(
            temperature, reads if other == temperature else (), divergence=True, kl=kl_here
        )
        kl_there = config.options.also_kl and not kl_here and other == 1.0
        verified = table if other == temperature else launch.statistics(other, reads, kl=kl_there)
        finite = torch.isfinite(table["lse_p"])
        acceptance = rows.acceptance
        if acceptance is None:
            columns = {name: verified[name] for name in dict.fromkeys(("overlap", *reads))}
            read = RowStatistics(raw.shape[1], **columns)
            acceptance = objective.verifier.from_statistics(read, rows.uniform).to(torch.float32)
        weight, acceptance = objective.weight_of(acceptance, rows.uniform, label=rows.label, finite=finite)
        value, factor = _value_and_factor(launch.name, table, finite)
        kl: Tensor | None = None
        if config.options.also_kl:
            at_one = table if kl_here else verified if kl_there else launch.statistics(1.0, kl=True)
            kl = torch.where(finite, at_one["kl"].clamp(min=0.0), 0.0)
        if config.wants_gradient:
            back = float(config.head.scale) / temperature
            worth = rows.scale.to(torch.float32) * weight * back
            launch.gradient(worth if factor is None else worth * factor)
    return BlockResult(value, weight, acceptance, verified["overlap"], (~finite).sum(), kl)


def _value_and_factor(name: str, table: dict[str, Tensor], finite: Tensor) -> tuple[Tensor, Tensor | None]:
    """The divergence of each row, and what its h lacks: [c] each, None for 1."""
    if name != "neg_log_acceptance":
        return torch.where(finite, table["value"].clamp(min=0.0), 0.0), None
    overlap = table["overlap"]
    floored = overlap.clamp(min=OVERLAP_FLOOR)
    inside = (overlap > OVERLAP_FLOOR) & (overlap < 1.0)
    return torch.where(finite, -floored.log(), 0.0), torch.where(inside, -1.0 / floored, 0.0)


def _named(divergence: Any) -> tuple[str, dict[str, Any]]:
    """The registry name of a divergence, "" for one from outside, and the parameters bound to it."""
    return name_in(DIVERGENCES, divergence) or "", dict(unbound(divergence)[1])


_LOOKED_AT: Any = WeakTensorKeyDictionary()
"""(version, whether it forbids a token) of each bias that has been looked at."""


def _forbids(bias: Tensor | None) -> bool:
    """Whether a bias has -inf; looked at again only where it has changed, since a look waits for the device."""
    if bias is None:
        return False
    known = _LOOKED_AT.get(bias)
    if known is None or known[0] != bias._version:
        known = _LOOKED_AT[bias] = (bias._version, bool(bias.isneginf().any()))
    return known[1]


def _current(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which may be another than the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _or_cannot_launch() -> Iterator[None]:
    """CannotLaunch for what keeps a kernel from being built; what the device itself reports is raised as it is."""
    try:
        yield
    except Exception as error:
        text = str(error).strip()
        if isinstance(error, torch.OutOfMemoryError) or any(
            chip in text for chip in ("[CUDA]", "[HIP]", "CUDA error", "HIP error")
        ):
            raise
        last = text.splitlines()[-1][:200] if text else ""
        raise CannotLaunch(f"{type(error).__name__}: {last}") from error


class _Launch:
    """The arguments of one chunk's launches."""

    def __init__(self, raw: Tensor, teacher: LiveChunk, rows: BlockInputs, config: BlockConfig) -> None:
        self.raw, self.teacher, self.rows, self.config = raw, teacher, rows, config
        self.name, params = _named(config.objective.divergence)
        self.terms, numbers = TERMS[self.name]
        self.a, self.b = numbers(params)
        unshared = teacher.unshared
        biases = (None if head.bias is None else head.bias.detach() for head in self._heads())
        self.before = (raw, teacher.raw, *biases, None if unshared is None else unshared.view(torch.int8))
        self.shape = (raw.stride(0), teacher.raw.stride(0), raw.shape[0], raw.shape[1])
        # Triton 3.9 warns where fusion is left to it
        self.options = {"TILE": TILE, "num_warps": WARPS, "enable_fp_fusion": True}
        self.floats = torch.empty(len(FLOATS), raw.shape[0], device=raw.device)

    def _heads(self) -> tuple[Head, Head]:
        return self.config.head, self.teacher.head

    def _finish(self, temperature: float) -> list[float | None]:
        """Factor and cap of student and teacher, as ``passes._load`` takes them."""
        found: list[float | None] = []
        for head in self._heads():
            cap = None if head.softcap is None else float(head.softcap)
            factor = float(head.scale) / temperature if cap is None else 2.0 * float(head.scale) / cap
            found += [None if factor == 1.0 else factor, None if cap is None else cap / temperature]
        return found

    def statistics(
        self, temperature: float, reads: tuple[str, ...] = (), *, divergence: bool = False, kl: bool = False
    ) -> dict[str, Tensor]:
        """``FLOATS`` and ``INTS`` of every row at a temperature, as far as ``reads``, divergence and kl need them; the
        gradient reads those that were taken with the divergence."""
        c = self.raw.shape[0]
        ints = torch.empty(len(INTS), c, dtype=torch.int32, device=self.raw.device)
        floats = self.floats if divergence else torch.empty_like(self.floats)
        parts = {FLAGS[name] for name in reads if name in FLAGS}
        flags = {flag: flag in parts for flag in ("RANK", "LABEL", "ENTROPY", "BHATTACHARYYA")}
        label = self.rows.label if flags["LABEL"] and self.rows.label is not None else None
        with _or_cannot_launch():
            passes.statistics[(c,)](
                *self.before, label, ints, floats, *self.shape, *self._finish(temperature), self.a, self.b,
                terms=self.terms if divergence else None, **flags, KL=kl, **self.options,
            )  # fmt: skip
        table: dict[str, Tensor] = dict(
            zip((*FLOATS, *INTS), (*floats.unbind(), *ints.unbind()), strict=True)
        )
        # 1 where the teacher's row is not finite, as in the reference: what a minimum makes of nan is Triton's choice
        for name in ("overlap", *(("bhattacharyya",) if flags["BHATTACHARYYA"] else ())):
            table[name] = torch.where(table["lse_p"].isfinite(), table[name].clamp(max=1.0), 1.0)
        if flags["ENTROPY"]:  # there a row whose teacher is not finite has the student for one
            table["teacher_entropy"] = torch.where(
                table["lse_p"].isfinite(), table["teacher_entropy"], table["student_entropy"]
            )
        if flags["RANK"]:
            table["student_top"] = table["student_top"].long()
        return table

    def gradient(self, worth: Tensor) -> None:
        """Writes the gradient over the student's product; worth [c]: what each row counts."""
        c, width = self.raw.shape
        with _or_cannot_launch():
            passes.gradient[(c, min(PROGRAMS, triton.cdiv(width, TILE)))](
                *self.before, self.floats, worth.contiguous(), *self.shape,
                *self._finish(self.config.options.temperature), self.a, self.b, terms=self.terms, **self.options,
            )  # fmt: skip
