"""A run from a recipe: assembled, measured, trained, measured again, and left behind as a folder."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch import distributed as dist
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from selectkd import __version__
from selectkd.assembly import Assembly, assemble
from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.data.supervised import supervised
from selectkd.models.save import save_student
from selectkd.schedules import TaidSchedule
from selectkd.training.breakdown import Breakdown, breakdown
from selectkd.training.card import model_card
from selectkd.training.counts import rank, ranks, sequence_means
from selectkd.training.evaluation import Evaluation, evaluate, probe
from selectkd.training.feed import Feed
from selectkd.training.ledger import Ledger
from selectkd.training.loop import SCHEDULES, train_loop
from selectkd.training.manifest import data_fingerprint, device_name, versions, write_manifest
from selectkd.training.metrics import MetricsLog
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import DistillTrainer

COLD_TAR = 0.2
"""Below this TAR at step 0 the gate leaves a student almost no signal (measured, see docs/log.md)."""

_LOG = logging.getLogger("selectkd")


class Progress(Protocol):
    """Who wants to hear of a run while it goes on; see ``training.progress.TrainingProgress``."""

    def stage(self, name: str, total: int | None = None) -> None: ...

    def line(self, line: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What a run came to. before, after: held-out measures, None without held-out text. kept: layers of a cut
    student.
    """

    run_dir: Path
    before: Evaluation | None
    after: Evaluation | None
    kept: list[int] | None
    steps: int
    best_step: int
    stopped_early: bool
    skipped: int
    seconds: float
    warnings: list[str] = field(default_factory=list)


def train(
    recipe: Any, *, progress: Progress | None = None, on_assembled: Callable[[Assembly], None] | None = None
) -> RunResult:
    """Runs a recipe and leaves manifest.json, metrics.jsonl and student/ in its output_dir.

    The student saved is the best one on held-out text with early stopping, else the last one.
    ``on_assembled`` sees the models before the first step. Raises ConfigError, DataError before weights load,
    NumericsError when numbers fail.
    """
    started = time.perf_counter()
    training = recipe.training
    set_seed(training.seed)
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    made = assemble(recipe, device=device, stage=None if progress is None else progress.stage)
    run_dir = Path(training.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    log = MetricsLog(run_dir / "metrics.jsonl", *(() if progress is None else (progress.line,)))
    feed = Feed(made.micro_batches)
    steps = training.max_steps or feed.steps_in(training.epochs or 1, training.gradient_accumulation)
    if on_assembled is not None:
        on_assembled(made)

    watch = _Watch(recipe, made, log, device)
    if progress is not None:
        progress.stage("measuring the student before")
    before = watch.look(0)
    if watch.tar < COLD_TAR and made.beta.start == made.beta.end < 1:
        made.told.append(cold(watch.tar))
    for message in made.told:
        _LOG.warning(message)

    if progress is not None:
        progress.stage("training", steps)
    ledger = _run(recipe, made, feed, steps, log, watch, device)
    if progress is not None:
        progress.stage("measuring the student after")
    after = watch.finish(ledger.step)
    result = RunResult(
        run_dir=run_dir,
        before=before,
        after=after,
        kept=made.kept,
        steps=ledger.step,
        best_step=watch.best_step,
        stopped_early=ledger.step < steps,
        skipped=ledger.skipped,
        seconds=time.perf_counter() - started,
        warnings=list(made.told),
    )
    if rank() == 0:
        save_student(
            made.student, made.tokenizer, run_dir / "student", _card(recipe, made, before, after, ledger)
        )
        write_manifest(run_dir / "manifest.json", _manifest(recipe, made, result, ledger, device))
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    return result


def cold(tar: float) -> str:
    """What to tell someone whose student agrees with the teacher almost nowhere."""
    return (
        f"TAR is {tar:.3f} at step 0, below {COLD_TAR}: the teacher accepts almost nothing, so the gate "
        "leaves almost no signal. Set objective.beta to {start: 1.0, end: 0.01, until_tar: 0.5}, or start "
        "from a warmer student (more layers, or layers chosen as measured)."
    )


def _run(
    recipe: Any, made: Assembly, feed: Feed, steps: int, log: MetricsLog, watch: _Watch, device: torch.device
) -> Ledger:
    training, reduction = recipe.training, recipe.objective.reduction
    temperature = recipe.objective.temperature
    warmup = round(training.warmup_ratio * steps)
    bad = Path(training.output_dir) / "bad_batches"
    also_kl = temperature != 1.0 or recipe.objective.divergence["name"] != "forward_kl"
    taid = TaidSchedule(steps=steps) if made.taid_follows else None
    if training.engine == "loop":
        ledger = Ledger(
            made.objective, reduction, made.beta, seed=training.seed, streams=made.streams, total_steps=steps,
            bad_batches=bad, device=device, taid=taid,
        )  # fmt: skip
        model = DistillationModel(
            made.student, made.teacher, temperature=temperature, chunk=training.chunk, also_kl=also_kl,
            gradient_filter=training.gradient_filter,
        )  # fmt: skip
        train_loop(
            model,
            feed,
            ledger,
            steps=steps,
            learning_rate=training.learning_rate,
            schedule=training.schedule,
            warmup_steps=warmup,
            weight_decay=training.weight_decay,
            max_grad_norm=training.max_grad_norm,
            accumulation=training.gradient_accumulation,
            log_every=training.log_every,
            on_line=log.write if rank() == 0 else None,
            after_step=watch,
        )
        return ledger
    args = TrainingArguments(
        output_dir=str(training.output_dir),
        max_steps=steps,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=SCHEDULES[training.schedule],
        warmup_steps=warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.log_every,
        optim="adamw_torch",
        seed=training.seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",
        report_to=list(training.report_to) or "none",
        disable_tqdm=True,
    )
    trainer = DistillTrainer(
        made.student,
        made.teacher,
        made.objective,
        made.micro_batches,
        args,
        reduction=reduction,
        temperature=temperature,
        chunk=training.chunk,
        beta=made.beta,
        taid=taid,
        streams=made.streams,
        also_kl=also_kl,
        gradient_filter=training.gradient_filter,
        bad_batches=bad,
        on_line=log.write,
        after_step=watch,
        processing_class=made.tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.ledger


class _Watch:
    """Looks at held-out text and the probe as a run goes on; keeps the best student; says when to stop."""

    def __init__(self, recipe: Any, made: Assembly, log: MetricsLog, device: torch.device) -> None:
        self.recipe, self.made, self.log, self.device = recipe, made, log, device
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

    def look(self, step: int) -> Evaluation | None:
        """Measures the student and writes a line; remembers the student where it is the best so far."""
        made, training = self.made, self.recipe.training
        line: dict[str, Any] = {"step": step}
        if made.heldout:
            self.latest = evaluate(
                made.student, made.teacher, made.heldout, replace(made.objective, beta=made.beta.end),
                seed=training.seed, streams=made.streams, chunk=training.chunk, device=self.device,
            )  # fmt: skip
            self.latest_step = step
            line["evaluation"] = self.latest.as_dict()
        if made.probe is not None:
            line |= self._probed()
        if self.latest is not None:
            self.tar = self.latest.tar
        if rank() == 0 and len(line) > 1:
            self.log.write(line)
        if self.latest is not None and self.latest_step == step:
            self._compare(step, self.latest)
        self.looked_at = step
        return self.latest

    def _probed(self) -> dict[str, Any]:
        made, training, line = self.made, self.recipe.training, {}
        verdicts = probe(
            made.student, made.teacher, made.probe, made.objective, seed=training.seed, chunk=training.chunk
        )
        line["probe_tar"] = tar_of(verdicts, made.probe)
        if self.breakdown is None:
            self.breakdown = breakdown(made.student, made.teacher, made.probe, chunk=training.chunk)
        line |= self.breakdown.acceptance(verdicts)
        if self.verdicts is not None:
            line["probe_lost"] = int(((self.verdicts >= 0.5) & (verdicts < 0.5)).sum())
            line["probe_won"] = int(((self.verdicts < 0.5) & (verdicts >= 0.5)).sum())
        self.verdicts, self.tar = verdicts, line["probe_tar"]
        return line

    def _compare(self, step: int, seen: Evaluation) -> None:
        if self.best_seen is None or seen.kl < self.best_seen.kl:
            self.best_seen, self.best_step, self.worse = seen, step, 0
            if self.patience is not None:
                trained = {n: p for n, p in self.made.student.named_parameters() if p.requires_grad}
                self.best = {name: p.detach().to("cpu", copy=True) for name, p in trained.items()}
        else:
            self.worse += 1

    def __call__(self, step: int) -> bool:
        """After each step: whether to stop."""
        save = self.recipe.training.save_every
        if save and step % save == 0 and rank() == 0:
            card = f"# A student distilled with selectkd, at step {step} of a run that was not over\n"
            save_student(self.made.student, self.made.tokenizer, self.log.path.parent / "student", card)
        if self.every and step % self.every == 0:
            self.look(step)
            return self.patience is not None and self.worse >= self.patience
        return False

    @torch.no_grad()
    def finish(self, step: int) -> Evaluation | None:
        """The last measure; with early stopping, of the best student, which is put back."""
        if self.looked_at != step:
            self.look(step)
        if not self.best:
            self.best_step = step
            return self.latest
        if self.worse:
            for name, parameter in self.made.student.named_parameters():
                if name in self.best:
                    parameter.copy_(self.best[name])
        return self.best_seen


def tar_of(verdicts: Tensor, batch: Any) -> float:
    """The mean over a batch's sequences of the share of their rows accepted."""
    shares, _ = sequence_means(verdicts, supervised(batch).sequence)
    return float(shares.mean()) if shares.numel() else 0.0


def _plain(spec: Any) -> Any:
    return spec.model_dump(exclude_none=True) if hasattr(spec, "model_dump") else spec


def _card(
    recipe: Any, made: Assembly, before: Evaluation | None, after: Evaluation | None, ledger: Ledger
) -> str:
    objective = _plain(recipe.objective)
    method = {key: value for key, value in objective.items() if value not in (None, [], ())}
    method["lora" if recipe.training.lora is not None else "fine-tuning"] = (
        _plain(recipe.training.lora) or "full"
    )
    return model_card(
        teacher=made.teacher_plan.source,
        student=made.student_source,
        data=made.streams,
        method=method,
        before={} if before is None else before.as_dict(),
        after={} if after is None else after.as_dict(),
        steps=ledger.step,
        tokens=ledger.tokens,
        version=__version__,
    )


def _manifest(
    recipe: Any, made: Assembly, result: RunResult, ledger: Ledger, device: torch.device
) -> dict[str, Any]:
    cut = None if made.cut is None else {"kept": made.kept, "choose": made.cut.choose, "kl": made.cut.kl}
    return {
        "config": recipe.model_dump(mode="json"),
        "versions": versions(),
        "device": device_name(device),
        "ranks": ranks(),
        "seed": recipe.training.seed,
        "teacher": {"source": made.teacher_plan.source, "revision": made.teacher_plan.revision},
        "student": {"source": made.student_source, "revision": made.student_revision, "cut": cut},
        "data": {
            "fingerprint": data_fingerprint(
                example for source in made.sources for example in source.examples
            ),
            "samples": sum(len(source.examples) for source in made.sources),
            "sources": [{"name": s.name, "told": s.told, "counts": dict(s.counts)} for s in made.sources],
            "heldout_samples": sum(int(batch.stream.shape[0]) for batch in made.heldout),
            "streams": list(made.streams),
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(made.tokenizer)},
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "skipped": result.skipped,
        "tokens": ledger.tokens,
        "seconds": round(result.seconds, 3),
        "tar": {"before": getattr(result.before, "tar", None), "after": getattr(result.after, "tar", None)},
        "before": None if result.before is None else result.before.as_dict(),
        "after": None if result.after is None else result.after.as_dict(),
        "warnings": result.warnings,
    }
