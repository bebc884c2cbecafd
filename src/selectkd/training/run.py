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
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from selectkd.errors import ResourceError, TeacherError
from selectkd.models.devices import training_device
from selectkd.models.precision import precision_of
from selectkd.models.save import save_student
from selectkd.models.sharded import is_sharded
from selectkd.objective.schedules import TaidSchedule
from selectkd.teachers.protocol import HasWeights, ReadsAhead
from selectkd.training.assembly import Assembly, assemble, prepare
from selectkd.training.checkpoint import Checkpoints, Stateful, read_part
from selectkd.training.checkpoint.parts import Named, Weights
from selectkd.training.counts import rank, total
from selectkd.training.feed import Feed
from selectkd.training.heldout.watch import Watch
from selectkd.training.ledger import Ledger
from selectkd.training.loggers import Loggers
from selectkd.training.loop import SCHEDULES, train_loop
from selectkd.training.optimizer import arguments
from selectkd.training.record.manifest import write_manifest
from selectkd.training.record.metrics import MetricsLog
from selectkd.training.record.result import Origin, RunResult, card_of, cut_of, finished_run, manifest_of
from selectkd.training.run_folder import CHECKPOINTS, FINISHED, Claim, claimed, facts, identity, same_servers
from selectkd.training.sharding import as_launched, check_sharding, ranks_meet
from selectkd.training.step import DistillationModel
from selectkd.training.stopping import StopRequests
from selectkd.training.trainer import LedgerTrainer, on_device

COLD_TAR = 0.2
"""Below this TAR at step 0 the gate leaves a student almost no signal (measured, see docs/log.md)."""

_LOG = logging.getLogger("selectkd")


class Progress(Protocol):
    """Who wants to hear of a run while it goes on; see ``training.progress.TrainingProgress``."""

    def stage(self, name: str, total: int | None = None) -> None: ...

    def line(self, line: dict[str, Any]) -> None: ...


def train(
    recipe: Any,
    *,
    progress: Progress | None = None,
    on_assembled: Callable[[Assembly], None] | None = None,
    resume: str = "auto",
    allow_change: Sequence[str] = (),
    device: torch.device | str = "auto",
) -> RunResult:
    """Runs a recipe and leaves run.json, metrics.jsonl, checkpoints/, manifest.json and student/ in its output_dir.

    resume: "auto" goes on with the run that is in output_dir, from its newest valid checkpoint, to the same bits as
    without the interruption; a finished run is left as it is. "never" takes a new folder only; a path is the checkpoint
    to go on from. allow_change: keys of the recipe that may differ from the run's. The student saved is the best one
    on held-out text with early stopping, else the last one. ``on_assembled`` sees the models before the first step.
    device: where the run is, as of ``training_device``.

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
            with precision.products(device), claim.threads(allow_change):
                return _train(recipe, claim, stop, progress, on_assembled, allow_change, started, device)


def _train(
    recipe: Any,
    claim: Claim,
    stop: StopRequests,
    progress: Progress | None,
    on_assembled: Callable[[Assembly], None] | None,
    allow_change: Sequence[str],
    started: float,
    device: torch.device,
) -> RunResult:
    training, run_dir = recipe.training, claim.folder
    set_seed(training.seed)
    said = None if claim.opened is None else read_part(claim.opened.path, "origin")
    if progress is not None:
        progress.stage("reading tokenizers and text")
    plan = prepare(recipe, device=device, date=claim.run.get("date") or _one_date())
    same_servers(plan.teacher, claim.run.get("teacher_weights"), allow_change)
    made = assemble(
        recipe,
        device=device,
        stage=None if progress is None else progress.stage,
        kept=None if said is None else said["kept"],
        plan=plan,
    )
    claim.settle(identity(recipe, facts(made)), allow_change)
    if isinstance(
        made.teacher, HasWeights
    ):  # now that its weights have been looked at: it may write the first text
        made.teacher.place(device)
    origin = Origin(made.kept, cut_of(made), list(made.told))
    log = MetricsLog(run_dir / "metrics.jsonl", *(() if progress is None else (progress.line,)))
    feed = Feed(made.micro_batches, made.teacher.ahead if isinstance(made.teacher, ReadsAhead) else None)
    steps = training.max_steps or feed.steps_in(training.epochs or 1, training.gradient_accumulation)
    if on_assembled is not None:
        on_assembled(made)

    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS, keep=training.keep, every=training.save_every, recipe=claim.hash,
        opened=claim.opened, stop=stop,
    )  # fmt: skip
    watch = Watch(recipe, made, log, device)
    checkpoints.register("metrics", log, heavy=True)
    checkpoints.register("watch", watch)
    if made.writer is not None:
        checkpoints.register("writer", made.writer, own=True)
    for number, extra in enumerate(made.extras):
        if isinstance(extra, Stateful):
            checkpoints.register(f"term-{number}", extra, own=True)
    checkpoints.register("origin", Named(origin, "kept", "cut", "told"))
    if claim.opened is None:
        log.load_state_dict({})  # what a run left that was killed before its first checkpoint
        if progress is not None:
            progress.stage("measuring the student before")
        watch.look(0)
        if watch.tar < COLD_TAR and made.beta.start == made.beta.end < 1:
            origin.told.append(cold(watch.tar))
    for message in [*claim.told, *origin.told]:
        _LOG.warning(message)

    if progress is not None:
        progress.stage("training", steps)
    stop.at_once = False
    try:
        ledger = _run(recipe, made, feed, steps, log, watch, checkpoints, device)
    except (TeacherError, ResourceError):
        path = checkpoints.rescue()
        if path is not None:
            _LOG.warning(
                f"the state of step {checkpoints.step} is in {path}; the same command goes on from there."
            )
        raise
    if progress is not None:
        progress.stage("measuring the student after")
    after = watch.finish(ledger.step)
    result = RunResult(
        run_dir=run_dir,
        before=watch.before,
        after=after,
        kept=origin.kept,
        steps=ledger.step,
        best_step=watch.best_step,
        stopped_early=ledger.step < steps,
        skipped=ledger.skipped,
        seconds=time.perf_counter() - started,
        warnings=list(origin.told),
        resumed_from=None if claim.opened is None else claim.opened.step,
    )
    if rank() == 0 or is_sharded(made.student):
        card = card_of(recipe, made, watch.before, after, ledger)
        save_student(made.student, made.tokenizer, run_dir / "student", card, dtype=made.precision.saved)
    if rank() == 0:
        write_manifest(run_dir / FINISHED, manifest_of(recipe, made, result, ledger, device, origin))
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    return result


def _one_date() -> str:
    """Now, as rank 0 has it: all ranks render the same text."""
    seconds = total([int(time.time()) if rank() == 0 else 0])[0]
    return datetime.fromtimestamp(seconds).isoformat()


def cold(tar: float) -> str:
    """What to tell someone whose student agrees with the teacher almost nowhere."""
    return (
        f"TAR is {tar:.3f} at step 0, below {COLD_TAR}: the teacher accepts almost nothing, so the gate "
        "leaves almost no signal. Set objective.beta to {start: 1.0, end: 0.01, until_tar: 0.5}, or start "
        "from a warmer student (more layers, or layers chosen as measured)."
    )


def _run(
    recipe: Any,
    made: Assembly,
    feed: Feed,
    steps: int,
    log: MetricsLog,
    watch: Watch,
    checkpoints: Checkpoints,
    device: torch.device,
) -> Ledger:
    training, reduction = recipe.training, recipe.objective.reduction
    if watch.stopped or checkpoints.step >= steps:  # the run broke off after its last step
        ledger = Ledger(made.objective, reduction, made.beta, streams=made.streams, device=device)
        checkpoints.register("ledger", ledger)
        checkpoints.register("student", Weights(made.student), heavy=True)
        return ledger
    warmup = round(training.warmup_ratio * steps)
    if made.writer is not None:
        made.writer.steps = steps
    ledger = Ledger(
        made.objective, reduction, made.beta, seed=training.seed, streams=made.streams, total_steps=steps,
        bad_batches=Path(training.output_dir) / "bad_batches", device=device,
        taid=TaidSchedule(steps=steps) if made.taid_follows else None, losses=made.losses, extras=made.extras,
        write=made.writer,
    )  # fmt: skip
    model = DistillationModel(
        made.student, made.teacher, options=made.options, offload=training.activation_offload
    )

    def on_line(line: dict[str, Any]) -> None:
        log.write(line if made.writer is None else line | made.writer.log_fields())

    if training.engine == "loop":
        train_loop(
            model,
            feed,
            ledger,
            steps=steps,
            schedule=training.schedule,
            warmup_steps=warmup,
            learning_rate=training.learning_rate,
            weight_decay=training.weight_decay,
            optimizer=training.optimizer,
            betas=training.betas,
            eps=training.eps,
            precision=made.precision,
            max_grad_norm=training.max_grad_norm,
            accumulation=training.gradient_accumulation,
            log_every=training.log_every,
            on_line=on_line if rank() == 0 else None,
            after_step=watch,
            checkpoints=checkpoints,
        )
        return ledger
    args = TrainingArguments(
        output_dir=str(training.output_dir),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        **arguments(
            training.optimizer,
            learning_rate=training.learning_rate,
            betas=training.betas,
            eps=training.eps,
            device=device,
        ),
        lr_scheduler_type=SCHEDULES[training.schedule],
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.log_every,
        bf16=made.precision.autocasts,
        seed=training.seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    on_device(args, device)

    def looked(step: int) -> bool:
        stop = watch(step)
        if watch.latest is not None and watch.latest_step == step:  # for the loggers of report_to
            seen = watch.latest.as_dict()
            trainer.log(
                {f"eval_{name}": seen[name] for name in ("kl", "perplexity", "tar", "bite", "overlap")}
            )
        return stop

    trainer = LedgerTrainer(
        model, feed, ledger, args,
        on_line=on_line, after_step=looked, checkpoints=checkpoints, processing_class=made.tokenizer,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    if training.report_to and rank() == 0:
        settings = {f"recipe.{key}": value for key, value in identity(recipe).items()}
        trainer.add_callback(Loggers(training.report_to, settings))
    trainer.train()
    return ledger
