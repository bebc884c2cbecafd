"""A run's student as it goes on: held-out measures, the probe, the best student, when to stop."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selectkd.data.supervised import supervised
from selectkd.models.fake_quantized import rounded_layers, unrounded
from selectkd.models.sharded import like
from selectkd.training.checkpoint.encoding import whole
from selectkd.training.counts import rank, sequence_means
from selectkd.training.heldout.breakdown import Breakdown, breakdown
from selectkd.training.heldout.evaluation import Evaluation, evaluate
from selectkd.training.heldout.tokens import look
from selectkd.training.record.looks import LookLog
from selectkd.training.record.metrics import MetricsLog

if TYPE_CHECKING:
    from selectkd.training.assembly import Assembly

_PLAIN = ("verdicts", "latest_step", "best_step", "worse", "tar", "looked_at", "best")
_EVALUATIONS = ("latest", "best_seen", "before")


class Watch:
    """Measures held-out text and the probe as a run goes on, keeps the best student and says when to stop."""

    def __init__(self, recipe: Any, assembly: Assembly, log: MetricsLog, device: torch.device) -> None:
        self.recipe, self.assembly, self.log, self.device = recipe, assembly, log, device
        self.every = recipe.training.evaluate_every
        stopping = recipe.training.early_stopping
        self.patience = None if stopping is None else stopping.patience
        self.verdicts: Tensor | None = None
        self.breakdown: Breakdown | None = None
        self.latest: Evaluation | None = None
        self.latest_step = self.best_step = 0
        self.best_seen: Evaluation | None = None
        self.worse, self.tar, self.looked_at = 0, 1.0, -1
        self.best: dict[str, Tensor] = {}
        self.before: Evaluation | None = None
        self.looks = LookLog(log.path.parent, assembly.tokenizer)
        self.unrounded: dict[str, float] = {}

    @property
    def stopped(self) -> bool:
        """Whether early stopping has ended the run."""
        return self.patience is not None and self.worse >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """The measures so far, the best student included."""
        state: dict[str, Any] = {name: vars(self)[name] for name in _PLAIN}
        state["breakdown"] = None if self.breakdown is None else asdict(self.breakdown)
        state["unrounded"] = self.unrounded
        return state | {name: _as_dict(vars(self)[name]) for name in _EVALUATIONS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """From here on measures are compared with the saved ones."""
        for name in _PLAIN:
            setattr(self, name, state[name])
        self.unrounded = state.get("unrounded", {})
        for name in _EVALUATIONS:
            setattr(self, name, None if state[name] is None else Evaluation(**state[name]))
        if self.verdicts is not None:
            self.verdicts = self.verdicts.to(self.device)
        if rank() == 0:
            self.looks.forget_after(self.looked_at)
        if state["breakdown"] is not None:
            self.breakdown = Breakdown(**{key: t.to(self.device) for key, t in state["breakdown"].items()})

    def measure(self, step: int) -> Evaluation | None:
        """Measures the student and writes a line; remembers the student where it is the best so far."""
        assembly = self.assembly
        line: dict[str, Any] = {"step": step}
        if assembly.heldout:
            self.latest, self.latest_step = self._evaluated(), step
            line["evaluation"] = self.latest.as_dict()
            if assembly.writer is not None:
                assembly.writer.evaluated(math.log(self.latest.perplexity))
        if assembly.probe is not None:
            line |= self._probed(step)
        if self.latest is not None:
            self.tar = self.latest.tar
        if rank() == 0 and len(line) > 1:
            self.log.write(line)
        if self.latest is not None and self.latest_step == step:
            self._compare(step, self.latest)
        self.looked_at = step
        if step == 0:
            self.before = self.latest
        return self.latest

    def _evaluated(self) -> Evaluation:
        assembly, training = self.assembly, self.recipe.training
        return evaluate(
            assembly.student, assembly.teacher, assembly.heldout,
            replace(assembly.objective, beta=assembly.beta.end), seed=training.seed, streams=assembly.streams,
            chunk=training.chunk, precision=assembly.precision,
        )  # fmt: skip

    def measure_unrounded(self, when: str) -> None:
        """Notes the held-out KL of a student that rounds its weights as if it did not, ``when``: before or after."""
        if self.assembly.heldout and rounded_layers(self.assembly.student):
            with unrounded(self.assembly.student):
                self.unrounded[when] = self._evaluated().kl

    def _probed(self, step: int) -> dict[str, Any]:
        assembly, training, line = self.assembly, self.recipe.training, {}
        columns = look(
            assembly.student, assembly.teacher, assembly.probe,
            replace(assembly.objective, beta=assembly.beta.end), reduction=self.recipe.objective.reduction,
            seed=training.seed, chunk=training.chunk, precision=assembly.precision,
        )  # fmt: skip
        if rank() == 0:
            self.looks.write(step, columns, assembly.probe, assembly.streams)
        verdicts = columns["acceptance"]
        line["probe_tar"] = tar_of(verdicts, assembly.probe)
        if self.breakdown is None:
            self.breakdown = breakdown(
                assembly.student,
                assembly.teacher,
                assembly.probe,
                chunk=training.chunk,
                precision=assembly.precision,
            )
        line |= self.breakdown.acceptance(verdicts)
        if self.verdicts is not None:
            line["probe_lost"] = int(((self.verdicts >= 0.5) & (verdicts < 0.5)).sum())
            line["probe_won"] = int(((self.verdicts < 0.5) & (verdicts >= 0.5)).sum())
        self.verdicts, self.tar = verdicts, line["probe_tar"]
        return line

    def _compare(self, step: int, evaluation: Evaluation) -> None:
        if self.best_seen is None or evaluation.kl < self.best_seen.kl:
            self.best_seen, self.best_step, self.worse = evaluation, step, 0
            if self.patience is not None:
                trained = {n: p for n, p in self.assembly.student.named_parameters() if p.requires_grad}
                self.best = {name: whole(p).clone() for name, p in trained.items()}
        else:
            self.worse += 1

    def __call__(self, step: int) -> bool:
        """After each step: whether to stop."""
        if self.every and step % self.every == 0:
            self.measure(step)
            return self.stopped
        return False

    @torch.no_grad()
    def finish(self, step: int) -> Evaluation | None:
        """The last measure; with early stopping, of the best student, which is put back."""
        if self.looked_at != step:
            self.measure(step)
        if not self.best:
            self.best_step = step
            return self.latest
        if self.worse:
            for name, parameter in self.assembly.student.named_parameters():
                if name in self.best:
                    parameter.copy_(like(self.best[name], parameter))
        return self.best_seen


def _as_dict(evaluation: Evaluation | None) -> dict[str, Any] | None:
    return None if evaluation is None else evaluation.as_dict()


def tar_of(verdicts: Tensor, batch: Any) -> float:
    """The mean over a batch's sequences of the share of their rows accepted."""
    shares = sequence_means(verdicts, supervised(batch))
    return float(shares.mean()) if shares.numel() else 0.0
