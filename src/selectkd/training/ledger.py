"""The ledger of a run: counts, beta, sums and the guard of every optimizer step."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from selectkd.data.durable import disk_error, write_plain
from selectkd.data.supervised import supervised
from selectkd.errors import NumericsError
from selectkd.loss.plan import Extra, LossPlan, StreamLoss, StreamSpec
from selectkd.objective.objective import Objective
from selectkd.objective.schedules import BetaSchedule, ShareSchedule, TaidSchedule
from selectkd.objective.selectors import adakd
from selectkd.training.counts import (
    Counts,
    checked,
    correction,
    count,
    rank,
    row_scale,
    summed,
)
from selectkd.training.first_pass import MicroBatch, RunFirstPass, planned
from selectkd.training.spikes import Spikes
from selectkd.training.sums import FIELDS, LOSS, WEIGHT, named, rates, step_sums, stream_rates, zeros
from selectkd.training.uniforms_of_text import draws

BAD_IN_A_ROW = 3
BAD_SHARE = 0.01
TEACHER_BAD_SHARE = 0.3
"""A run ends after more than BAD_IN_A_ROW steps without finite numbers one after another, or more than
BAD_SHARE of all its steps (and more than BAD_IN_A_ROW), or a step in which this share of the teacher's rows
is not finite.
"""


@dataclass
class Ledger:
    """Keeps the numbers of a run, step by step: ``begin``, ``add`` for each micro-batch, ``reduce``,
    ``close_step``.

    Every rank keeps the same ledger, since sums are reduced over ranks in ``reduce``; beta and the guard then
    agree. bad_batches: a folder for the token ids of steps that were left out. taid: a schedule for the t of
    ``taid``. losses: one for each stream, where streams differ. extras: what changes the terms of the loss. write:
    (batch, step) -> the batch with its text written, before anything is counted.
    """

    objective: Objective
    reduction: str = "sequence_mean"
    beta: BetaSchedule | None = None
    seed: int = 42
    streams: Sequence[str] = ("data",)
    total_steps: int | None = None
    bad_batches: Path | None = None
    device: torch.device | str = "cpu"
    taid: TaidSchedule | None = None
    losses: Sequence[StreamSpec] = ()
    extras: Sequence[Extra] = ()
    write: Callable[[Any, int], Any] | None = None

    step: int = field(default=0, init=False)  # optimizer steps done, skipped ones included
    left_out: list[int] = field(default_factory=list, init=False)  # steps without finite numbers
    tokens: int = field(default=0, init=False)
    tar: float = field(default=0.0, init=False)  # of the last step
    grad_norm: float = field(default=0.0, init=False)  # of the last step, before clipping
    last: dict[str, float] = field(default_factory=dict, init=False)  # sums of the last step

    def __post_init__(self) -> None:
        checked(self.reduction)
        if self.beta is None:
            self.beta = BetaSchedule(self.objective.beta, self.objective.beta)
        gate = self.objective.verifier
        self.share = (
            ShareSchedule(gate.share, gate.change, gate.floor)
            if isinstance(gate, adakd) and gate.change
            else None
        )
        self._in_a_row = 0
        self.spikes = Spikes()
        self._micro_batches: list[MicroBatch] = []
        self._counts = Counts(0, 0)
        self._sums = zeros(len(self.streams), self.device)
        self._window: list[Tensor] = []  # in main memory: a log line waits for nothing
        self._since = time.perf_counter()
        self.now = self.objective
        self.plan = LossPlan.of(self.objective)

    @property
    def skipped(self) -> int:
        """How many steps were left out."""
        return len(self.left_out)

    def state_dict(self) -> dict[str, Any]:
        """The book between two steps, schedules of beta and t included."""
        assert self.beta is not None  # __post_init__ saw to it
        return {
            "step": self.step,
            "left_out": list(self.left_out),
            "in_a_row": self._in_a_row,
            "spikes": self.spikes.state_dict(),
            "tokens": self.tokens,
            "tar": self.tar,
            "last": dict(self.last),
            "window": list(self._window),  # of finished steps, which nothing changes
            "best_tar": self.beta.best_tar,
            "taid": None if self.taid is None else asdict(self.taid),
            "share": None if self.share is None else asdict(self.share),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The next step is the one after the saved one."""
        assert self.beta is not None  # __post_init__ saw to it
        self.step, self.left_out, self._in_a_row = state["step"], list(state["left_out"]), state["in_a_row"]
        self.tokens, self.tar, self.last = state["tokens"], state["tar"], dict(state["last"])
        self.spikes.load_state_dict(state["spikes"])
        # sums of a checkpoint from before always_accepted was one of them have no place for it
        size = len(zeros(len(self.streams)))
        self._window = [one for one in state["window"] if len(one) == size]
        self.beta = replace(self.beta, best_tar=state["best_tar"])
        if self.share is not None and state.get("share") is not None:
            self.share = ShareSchedule(**state["share"])
        if self.taid is not None and state["taid"] is not None:
            self.taid = replace(
                self.taid, **{key: state["taid"][key] for key in ("t", "mean_fall", "last_loss")}
            )

    def begin(self, batches: Sequence[Any], first_pass: RunFirstPass | None = None) -> list[MicroBatch]:
        """The micro-batches of one optimizer step, counted over all ranks and scaled; sets the objective of
        the step. first_pass: a first pass of the model over a micro-batch, for what must be known of the whole step.
        """
        if self.write is not None:
            batches = [self.write(batch, self.step) for batch in batches]
        self._counts = count([supervised(batch) for batch in batches])  # counted where the batches are made
        batches = [batch.to(self.device) for batch in batches]
        assert self.beta is not None  # __post_init__ saw to it
        self.now = replace(self.objective, beta=self.beta.value(self.step, self.tar))
        if self.taid is not None:
            self.now = replace(self.now, divergence={"name": "taid", "t": self.taid.t})
        if self.share is not None:
            self.now = replace(self.now, verifier=replace(self.now.verifier, share=self.share.share))
        total = self.total_steps or self.step + 1
        streams = [spec.at(self.now, self.step, total) for spec in self.losses]
        self.plan = LossPlan(tuple(streams) or (StreamLoss(self.now),), self.extras, self.step)
        self._sums = zeros(len(self.streams), self.device)
        last = len(batches) - 1
        self._micro_batches = [
            self._counted(batch, last=index == last) for index, batch in enumerate(batches)
        ]
        plans = planned(
            self.plan, self._micro_batches, first_pass, counts=self._counts, reduction=self.reduction
        )
        self._micro_batches = [
            replace(micro, plan=plan) for micro, plan in zip(self._micro_batches, plans, strict=True)
        ]
        return self._micro_batches

    def _counted(self, batch: Any, *, last: bool) -> MicroBatch:
        rows = supervised(batch)
        scale = row_scale(rows, self._counts, self.reduction)
        uniform = draws(batch, rows, self.plan.uniforms_per_token, seed=self.seed, step=self.step)
        return MicroBatch(batch, rows, scale, uniform, last=last)

    @torch.no_grad()
    def add(self, micro: MicroBatch, loss: Tensor, sums: dict[str, Tensor]) -> None:
        """Books the loss and sums of one micro-batch."""
        self._sums += step_sums(micro, loss, sums, streams=len(self.streams))

    @torch.no_grad()
    def reduce(self, parameters: Iterable[Tensor]) -> Tensor:
        """Reduces the step's sums over ranks, finishes the gradient (see ``correction``) and returns the step's loss, a
        number on the device: nothing is read before ``close_step``.
        """
        total = summed(self._sums)
        loss = total[LOSS] / self._counts.ranks
        if self.reduction == "weight_mean":
            factor = correction(self._counts, total[WEIGHT])
            loss = loss * factor
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
        total[LOSS] = loss
        self._sums = total
        return loss

    def close_step(self, grad_norm: float | Tensor) -> bool:
        """Closes the step; False where its loss or gradient norm is not finite, and the optimizer must not
        step. The one place of a step where the host waits for the device: sums and norm are read together.

        Raises NumericsError when that happens more often than a run may bear, and where the teacher's rows are bad.
        """
        if isinstance(grad_norm, DTensor):  # of sharded parameters: each rank has a part of it
            grad_norm = grad_norm.full_tensor()
        norm = torch.as_tensor(grad_norm, dtype=torch.float64, device=self._sums.device).reshape(1)
        *read, self.grad_norm = torch.cat([self._sums, norm]).tolist()
        self.last = dict(zip(FIELDS, read[: len(FIELDS)], strict=True))
        self._check_teacher()
        self.step += 1
        good = math.isfinite(self.last["loss"]) and math.isfinite(self.grad_norm)
        if good:
            self._in_a_row = 0
            self.spikes.see(self.step, self.grad_norm)
            self._window.append(torch.tensor(read, dtype=torch.float64))
            self.tokens += int(self.last["n"])
            if self.taid is not None:
                self.taid.update(self.step, self.last["loss"])
            if self.share is not None:
                self.share.update(self.last["loss"])
            if self.last["sequences"]:
                self.tar = self.last["tar"] / self.last["sequences"]
            return True
        self.left_out.append(self.step)
        self._in_a_row += 1
        where = self._keep_batches()
        if self._in_a_row > BAD_IN_A_ROW or self.skipped > max(
            BAD_IN_A_ROW, BAD_SHARE * (self.total_steps or math.inf)
        ):
            raise NumericsError(
                f"step {self.step}: loss {self.last['loss']} and gradient norm {self.grad_norm}. "
                f"{self._in_a_row} steps in a row and {self.skipped} in all were left out because their "
                f"numbers are not finite.{where} "
                "Lower training.learning_rate or train in float32."
            )
        return False

    def _check_teacher(self) -> None:
        rows, bad = self.last["n"], self.last["teacher_nonfinite"]
        if rows and bad >= TEACHER_BAD_SHARE * rows and bad > 1:
            raise NumericsError(
                f"step {self.step + 1}: {int(bad)} of {int(rows)} rows of the "
                "teacher are not finite. Load the teacher in float32 or bfloat16, or check its weights; "
                "the student is untouched by this step."
            )

    def line(self) -> dict[str, Any]:
        """What the steps since the last line amount to, for the log; drains the window."""
        seconds = max(time.perf_counter() - self._since, 1e-9)
        self._since = time.perf_counter()
        steps = len(self._window)
        total = torch.stack(self._window).sum(0) if steps else zeros(len(self.streams))
        self._window = []
        sums = named(total)
        line: dict[str, Any] = {"step": self.step, "loss": sums["loss"] / steps if steps else None}
        line |= rates(sums) | {
            "beta": self.now.beta,
            "tokens": self.tokens,
            "tokens_per_second": sums["n"] / seconds,
            "skipped": self.skipped,
            "spikes": len(self.spikes.steps),
            "teacher_nonfinite": int(sums["teacher_nonfinite"]),
        }
        if self.share is not None:
            line["share"] = self.share.share
        line["streams"] = stream_rates(total, self.streams)
        return line

    def _keep_batches(self) -> str:
        if self.bad_batches is None:
            return ""
        ids = [micro.batch.input_ids.tolist() for micro in self._micro_batches]
        path = self.bad_batches / f"step-{self.step:06d}-rank-{rank()}.json"
        kept = {"step": self.step, "loss": repr(self.last["loss"]), "input_ids": ids}
        try:
            self.bad_batches.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, self.bad_batches) from error
        write_plain(path, json.dumps(kept).encode())
        return f" Their token ids are in {self.bad_batches}."
