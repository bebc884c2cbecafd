"""A run from a recipe: assembled, measured, trained, measured again, and left behind as a folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import distributed as dist
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from selectkd.errors import DataError, ResourceError, TeacherError
from selectkd.models.devices import training_device
from selectkd.models.precision import precision_of
from selectkd.models.save import save_integers, save_student
from selectkd.models.sharded import is_sharded
from selectkd.objective.schedules import TaidSchedule
from selectkd.teachers.protocol import HasWeights, ReadsAhead
from selectkd.training.arguments import training_arguments
from selectkd.training.assembly import Assembly, assemble
from selectkd.training.checkpoint import Checkpoints, Stateful, read_part
from selectkd.training.checkpoint.parts import Weights
from selectkd.training.checks import prepare
from selectkd.training.counts import rank, total
from selectkd.training.feed import BatchFeed
from selectkd.training.heldout.watch import Watch
from selectkd.training.ledger import Ledger
from selectkd.training.loggers import Loggers, written
from selectkd.training.record.card import model_card
from selectkd.training.record.manifest import write_manifest
from selectkd.training.record.metrics import MetricsLog
from selectkd.training.record.result import Origin, RunResult, cut_of, facts_of, finished_run, manifest_of
from selectkd.training.run_folder import (
    CHECKPOINTS,
    FINISHED,
    Claim,
    claimed,
    facts,
    identity,
    noting_errors,
    same_servers,
)  # fmt: skip
from selectkd.training.sharding import as_launched, check_sharding, ranks_meet
from selectkd.training.step import DistillationModel
from selectkd.training.stopping import StopRequests
from selectkd.training.trainer import LedgerTrainer

COLD_TAR = 0.2
"""Below this TAR at step 0 the gate leaves a student almost no signal (measured, see docs/log.md)."""

LOGGED = ("kl", "perplexity", "tar", "bite", "overlap")
"""Held-out measures that the loggers of report_to receive."""

_LOG = logging.getLogger("selectkd")


class Progress(Protocol):
    """A listener to a run while it goes on, such as ``training.record.progress.TrainingProgress``."""

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

    def line(self, line: dict[str, Any]) -> None: ...


def train(
    recipe: Any,
    *,
    progress: Progress | None = None,
    on_assembled: Callable[[Assembly], None] | None = None,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    device: torch.device | str = "auto",
    report: Callable[[Path], Path] | None = None,
) -> RunResult:
    """Runs a recipe and leaves run.json, metrics.jsonl, checkpoints/, manifest.json and student/ in its output_dir,
    student-int8/ or student-int4/ beside it where training.fake_quantization says so.

    resume: "auto" goes on with the run that is in output_dir, from its newest valid checkpoint, to the same bits as
    without the interruption; a finished run is left as it is. "never" takes a new folder only; a path is the checkpoint
    to go on from. allow_change: keys of the recipe that may differ from the run's. The student saved is the best one
    on held-out text with early stopping, else the last one. ``on_assembled`` sees the models before the first step.
    device: where the run is, as of ``training_device``. report: writes the page of the finished run folder and returns
    its path, such as ``report.write_report``; where training.report is true. What it raises becomes a warning.

    Raises ConfigError, DataError before weights load, IntegrityError for a damaged checkpoint that was named,
    TeacherError (the state saved), NumericsError when numbers fail, ResourceError, Preempted, Interrupted.
    """
    device = training_device(device)
    started = time.perf_counter()
    with as_launched(recipe) as recipe:
        ranks_meet(device)  # now, so that one alone claims the folder
        check_sharding(recipe, device)
        run_dir = Path(recipe.training.output_dir)
        with StopRequests() as stop, claimed(run_dir, recipe, resume=resume, allowed=allow_change) as claim:
            finished = finished_run(run_dir, recipe, claim)
            if finished:
                return finished
            precision = precision_of(recipe.training.precision, device)
            with noting_errors(run_dir), precision.products(device), claim.threads(allow_change):
                run = _Run(recipe, claim, progress, allow_change, device, stop)
                if on_assembled is not None:
                    on_assembled(run.assembly)
                result = run.finish(run.train(), started)
                run.report(report)
                return result


class _Run:
    """One run, from the parts that its recipe names to the folder that it leaves."""

    def __init__(
        self,
        recipe: Any,
        claim: Claim,
        progress: Progress | None,
        allow_change: Sequence[str],
        device: torch.device,
        stop: StopRequests,
    ) -> None:
        self.recipe, self.claim, self.device, self.stop = recipe, claim, device, stop
        self.stage = _silent if progress is None else progress.stage
        training, folder = recipe.training, claim.folder
        set_seed(training.seed)
        self.assembly = assembly = self._assembled(allow_change)
        self.origin = Origin(assembly.kept, cut_of(assembly), list(assembly.warnings))
        self.log = MetricsLog(folder / "metrics.jsonl", *(() if progress is None else (progress.line,)))
        self.feed = feed_of(assembly, workers_of(recipe.data, device))
        self.steps = steps_of(training, self.feed)
        self.checkpoints = Checkpoints(
            folder / CHECKPOINTS, keep=training.keep, every=training.save_every, recipe=claim.hash,
            opened=claim.opened, stop=stop,
        )  # fmt: skip
        self.watch = Watch(recipe, assembly, self.log, device)
        self.loggers: Loggers | None = None

    def _assembled(self, allow_change: Sequence[str]) -> Assembly:
        """The parts of the run, compared with those it began with; the teacher is where it will work."""
        recipe, claim = self.recipe, self.claim
        origin = None if claim.opened is None else read_part(claim.opened.path, "origin")
        self.stage("reading tokenizers and text")
        plan = prepare(
            recipe, device=self.device, date=claim.run.get("date") or _one_date(), stage=self.stage
        )
        same_servers(plan.teacher, claim.run.get("teacher_weights"), allow_change)
        assembly = assemble(
            recipe,
            device=self.device,
            stage=self.stage,
            kept=None if origin is None else origin["kept"],
            plan=plan,
        )
        claim.settle(identity(recipe, facts(assembly)), allow_change)
        if isinstance(assembly.teacher, HasWeights):
            assembly.teacher.place(self.device)  # after its checksum, and before it writes the first text
        return assembly

    def train(self) -> Ledger:
        """Measures the student, trains it, and returns the ledger of the run as it ended."""
        self._register()
        if self.claim.opened is None:
            self._measure_before()
        else:
            self.log.resumed(self.claim.opened.step)
        for message in [*self.claim.warnings, *self.origin.warnings]:
            _LOG.warning(message)
        self.stage("training", self.steps)
        self.stop.at_once = False
        try:
            return self._trained()
        except (TeacherError, ResourceError, DataError):
            path = self.checkpoints.rescue()
            if path is not None:
                _LOG.warning(
                    f"the state of step {self.checkpoints.step} is in {path}; the same command resumes from there."
                )
            raise

    def _register(self) -> None:
        """Adds the parts beside the Trainer to the checkpoints."""
        self.checkpoints.register("metrics", self.log, heavy=True)
        self.checkpoints.register("watch", self.watch)
        if self.assembly.writer is not None:
            self.checkpoints.register("writer", self.assembly.writer, own=True)
        for number, extra in enumerate(self.assembly.extras):
            if isinstance(extra, Stateful):
                self.checkpoints.register(f"term-{number}", extra, own=True)
        self.checkpoints.register("origin", self.origin)

    def _measure_before(self) -> None:
        self.log.load_state_dict({})  # a run that was killed before its first checkpoint left lines
        self.stage("measuring the student before")
        self.watch.measure(0)
        self.watch.measure_unrounded("before")
        beta = self.assembly.beta
        if self.watch.tar < COLD_TAR and beta.start == beta.end < 1:
            self.origin.warnings.append(cold(self.watch.tar))

    def _trained(self) -> Ledger:
        training, assembly, watch = self.recipe.training, self.assembly, self.watch
        if watch.stopped or self.checkpoints.step >= self.steps:  # the run broke off after its last step
            ledger = Ledger(
                assembly.objective, self.recipe.objective.reduction, assembly.beta,
                streams=assembly.streams, device=self.device,
            )  # fmt: skip
            self.checkpoints.register("ledger", ledger)
            self.checkpoints.register("student", Weights(assembly.student), heavy=True)
            return ledger
        if assembly.writer is not None:
            assembly.writer.steps = self.steps
        ledger = Ledger(
            assembly.objective, self.recipe.objective.reduction, assembly.beta, seed=training.seed,
            streams=assembly.streams, total_steps=self.steps, device=self.device,
            bad_batches=self.claim.folder / "bad_batches", losses=assembly.losses, extras=assembly.extras,
            taid=TaidSchedule(steps=self.steps) if assembly.taid_follows else None, write=assembly.writer,
        )  # fmt: skip
        model = DistillationModel(
            assembly.student, assembly.teacher, options=assembly.options, offload=training.activation_offload
        )
        trainer = LedgerTrainer(
            model, self.feed, ledger,
            training_arguments(training, steps=self.steps, precision=assembly.precision, device=self.device),
            on_line=self._write_line, after_step=lambda step: self._after_step(trainer, step),
            checkpoints=self.checkpoints, processing_class=assembly.tokenizer,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if model.options.compiled:
            self.stage("training, with the loss compiled (training.compile_loss)", self.steps)
        if training.report_to and rank() == 0:
            settings = {f"recipe.{key}": value for key, value in identity(self.recipe).items()}
            self.loggers = Loggers(training.report_to, settings)
            trainer.add_callback(self.loggers)
        trainer.train()
        return ledger

    def _write_line(self, line: dict[str, Any]) -> None:
        writer = self.assembly.writer
        self.log.write(line if writer is None else line | writer.log_fields())

    def _after_step(self, trainer: LedgerTrainer, step: int) -> bool:
        """Measures the student where it is time, also for the loggers of report_to; whether to stop."""
        stop = self.watch(step)
        if self.watch.latest is not None and self.watch.latest_step == step:
            measures = self.watch.latest.as_dict()
            trainer.log({f"eval_{name}": measures[name] for name in LOGGED})
        return stop

    def finish(self, ledger: Ledger, started: float) -> RunResult:
        """Measures the student and writes it and the manifest into the run folder."""
        self.stage("measuring the student after")
        recipe, assembly, watch, folder = self.recipe, self.assembly, self.watch, self.claim.folder
        after = watch.finish(ledger.step)
        watch.measure_unrounded("after")
        result = RunResult(
            run_dir=folder,
            before=watch.before,
            after=after,
            kept=self.origin.kept,
            steps=ledger.step,
            best_step=watch.best_step,
            stopped_early=ledger.step < self.steps,
            skipped=ledger.skipped,
            seconds=time.perf_counter() - started,
            warnings=list(self.origin.warnings),
            resumed_from=None if self.claim.opened is None else self.claim.opened.step,
            unrounded=dict(watch.unrounded),
        )
        manifest = manifest_of(recipe, assembly, result, ledger, self.device, self.origin)
        if rank() == 0 or is_sharded(assembly.student):
            card = model_card(facts_of(recipe, manifest))
            save_student(
                assembly.student,
                assembly.tokenizer,
                folder / "student",
                card,
                dtype=assembly.precision.saved,
                vision=assembly.vision,
            )
        if rank() == 0:
            scheme = recipe.training.fake_quantization
            if scheme is not None and scheme.name.startswith("int"):
                save_integers(assembly.student, assembly.tokenizer, folder / f"student-{scheme.name}")
            write_manifest(folder / FINISHED, manifest)
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        return result

    def report(self, write: Callable[[Path], Path] | None) -> None:
        """Writes the page about the finished run, where the recipe wants one, and hands it to the loggers."""
        wanted = rank() == 0 and self.recipe.training.report
        path = written(write, self.claim.folder) if wanted and write is not None else None
        if self.loggers is not None:
            self.loggers.close(path)


def feed_of(assembly: Assembly, workers: int = 0) -> BatchFeed:
    """The micro-batches of a recipe's text; a teacher that reads ahead gets each of them one earlier.

    workers: processes that make them.
    """
    ahead = assembly.teacher.ahead if isinstance(assembly.teacher, ReadsAhead) else None
    return BatchFeed(assembly.micro_batches, ahead, workers)


def workers_of(data: Any, device: torch.device) -> int:
    """The processes that make batches: as data.workers says, or one where the training thread has other work."""
    return int(device.type != "cpu" or data.streaming) if data.workers is None else data.workers


def steps_of(training: Any, feed: BatchFeed) -> int:
    """The optimizer steps of a recipe's run."""
    return training.max_steps or feed.steps_in(training.epochs or 1, training.gradient_accumulation)


def _silent(name: str, total: int | None = None, done: int = 0) -> None:
    """Shows nobody what stage a run is at."""


def _one_date() -> str:
    """Now, as rank 0 has it: all ranks render the same text."""
    seconds = total([int(time.time()) if rank() == 0 else 0])[0]
    return datetime.fromtimestamp(seconds).isoformat()


def cold(tar: float) -> str:
    """The warning about a student that agrees with the teacher almost nowhere."""
    return (
        f"TAR is {tar:.3f} at step 0, below {COLD_TAR}: the teacher accepts almost nothing, so the gate "
        "leaves almost no signal. Set objective.beta to {start: 1.0, end: 0.01, until_tar: 0.5}, or start "
        "from a warmer student (more layers, or layers chosen as measured)."
    )
