"""``selectkd doctor``: what can fail later is looked at now, first all that needs no weight, then with the models.

n supervised rows of the probe batch.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback

from selectkd.config.departures import as_call, departure_warnings
from selectkd.config.training import Training
from selectkd.data import inspect
from selectkd.data.example import Example
from selectkd.data.render import eos_ids_of
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, DataError, NumericsError, ResourceError, SelectKDError, TeacherError
from selectkd.loss.teacher_rows import LiveRows
from selectkd.models.devices import free_memory, training_device, wait_for
from selectkd.models.head import head_of
from selectkd.models.load import check_local
from selectkd.models.sharded import inside
from selectkd.teachers import exactness
from selectkd.teachers.cache.origin import weights_checksum
from selectkd.training.arguments import training_arguments
from selectkd.training.assembly import Assembly, assemble
from selectkd.training.checkpoint.folder import newest
from selectkd.training.checks import Plan, prepare
from selectkd.training.counts import ranks, total
from selectkd.training.heldout.evaluation import probe
from selectkd.training.heldout.watch import tar_of
from selectkd.training.ledger import Ledger
from selectkd.training.preflight.advice import Table, advice
from selectkd.training.preflight.calibration import calibration
from selectkd.training.preflight.estimate import Memory, estimate
from selectkd.training.preflight.images import images_matter
from selectkd.training.preflight.signs import signs_of
from selectkd.training.record.metrics import check_loggers
from selectkd.training.run import COLD_TAR, cold, feed_of, steps_of
from selectkd.training.run_folder import (
    CHECKPOINTS,
    RUN,
    check_output_dir,
    date_of,
    read_run,
    same_recipe,
    same_servers,
)
from selectkd.training.sharding import as_launched, check_sharding, ranks_meet
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer

KS = (1, 5, 20)
"""The k of greedy_topk that TAR at step 0 is reported for: strict, the paper's, lenient."""

SHOWN = 2


@dataclass(frozen=True)
class Finding:
    """What one check found; exit_code: what a run would end with, 0 where it is fine."""

    check: str
    ok: bool
    message: str
    exit_code: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {"check": self.check, "ok": self.ok, "message": self.message}


def doctor(
    recipe: Any, *, device: torch.device | str = "auto", stage: Callable[..., None] | None = None
) -> Iterator[Finding]:
    """One Finding a check, as each is done; nothing is written. Where one of those without weights fails, the models
    are not loaded. device: where the run will be, as of ``training_device``. stage hears what takes its time, as of
    ``assemble``.
    """
    fine, device = True, training_device(device)
    with ExitStack() as stack:
        try:
            recipe = stack.enter_context(as_launched(recipe))
        except ConfigError as error:
            yield Finding("sharding", False, str(error), error.exit_code)
            return
        ranks_meet(device)
        for finding in without_weights(recipe, device):
            fine = fine and finding.ok
            yield finding
        if fine:
            yield from with_weights(recipe, device, stage)


def without_weights(recipe: Any, device: torch.device) -> Iterator[Finding]:
    """Folder, loggers, weights by their headers, tokenizers, objective, text and masks, memory and disk."""
    yield tried("output_dir", lambda: _folder(recipe))
    yield tried("loggers", lambda: _loggers(recipe))
    yield tried("weights", lambda: _weights(recipe))
    sharded = tried("sharding", lambda: check_sharding(recipe, device) or "")
    if sharded.message:
        yield sharded
    plan: Plan | None = None
    try:
        folder = Path(recipe.training.output_dir)
        plan = prepare(recipe, device=device, date=date_of(folder))
        if (folder / RUN).is_file():
            same_servers(plan.teacher, read_run(folder).get("teacher_weights"))
    except SelectKDError as error:
        names = {DataError: "text", TeacherError: "teacher", ConfigError: "names and tokenizers"}
        check = next((name for kind, name in names.items() if isinstance(error, kind)), "teacher")
        yield Finding(check, False, str(error), error.exit_code)
    if plan is not None:
        yield Finding("tokenizer", True, _tokenizer(plan))
        yield Finding("objective", True, _objective(plan, recipe))
        yield tried("text", lambda: _text(plan))
        yield tried("masks", lambda: _masks(plan))
    memory: list[Memory] = []
    yield tried("memory", lambda: _memory(recipe, memory, device))
    if memory:
        yield tried("disk", lambda: _disk(recipe, memory[0]))


def with_weights(
    recipe: Any, device: torch.device, stage: Callable[..., None] | None = None
) -> Iterator[Finding]:
    """The models loaded: the teacher's answer, TAR at step 0, whether a gate is likely to help, calibration, one
    optimizer step, the ranks.
    """
    assembly: Assembly | None = None
    recipe = with_probe(recipe)
    try:
        assembly = assemble(
            recipe, device=device, date=date_of(Path(recipe.training.output_dir)), stage=stage
        )
    except SelectKDError as error:
        yield Finding("models", False, str(error), error.exit_code)
    if assembly is None:
        return
    named = f"teacher {assembly.teacher_plan.source}, student {assembly.student_source}"
    yield Finding(
        "models",
        True,
        ". ".join([named, *(assembly.cut.searched if assembly.cut else []), *assembly.warnings]),
    )
    if assembly.vision is not None:
        yield tried("images", lambda: images_matter(assembly))
    yield tried("teacher", lambda: _teacher(assembly))
    yield tried("tar", lambda: _tar(assembly, recipe))
    yield tried("gate", lambda: _gate(assembly))
    yield tried("calibration", lambda: calibration(assembly))
    yield tried("step", lambda: _step(assembly, recipe, device))
    if ranks() > 1:
        yield tried("ranks", lambda: _ranks(assembly))


def with_probe(recipe: Any) -> Any:
    """The recipe, with the usual number of probe samples where it follows none: they are what is measured."""
    training = recipe.training
    samples = training.probe_samples or Training.model_fields["probe_samples"].default
    return recipe.model_copy(update={"training": training.model_copy(update={"probe_samples": samples})})


def tried(check: str, look: Callable[[], str]) -> Finding:
    """A check as a Finding: the message it returns, or the error it raises."""
    try:
        return Finding(check, True, look())
    except SelectKDError as error:
        return Finding(check, False, str(error), error.exit_code)


def _folder(recipe: Any) -> str:
    folder = Path(recipe.training.output_dir)
    if not check_output_dir(folder):
        return f"{folder} is free"
    same_recipe(folder, recipe)
    found, damaged = newest(folder / CHECKPOINTS)
    begun = "the beginning" if found is None else found.path.name
    return f"{folder} holds this run; it would go on from {begun}" + "".join(
        f". {problem}" for _, problem in damaged
    )


def _weights(recipe: Any) -> str:
    """Local model folders hold the models that they describe, by their headers, and nothing that would run."""
    here = [name for name in recipe.models if Path(name).expanduser().is_dir()]
    check_local(*here)
    text = "no pickles, no code, the tensors that config.json describes"
    return f"{', '.join(here)}: {text}" if here else "no local model folder is named"


def _loggers(recipe: Any) -> str:
    check_loggers(recipe.training.report_to)
    return ", ".join(["metrics.jsonl", *recipe.training.report_to])


def _tokenizer(plan: Plan) -> str:
    end = plan.tokenizer.eos_token
    return f"{len(plan.tokenizer):,} tokens, the teacher's; end of sequence {end if end is not None else 'unknown'}"


def _objective(plan: Plan, recipe: Any) -> str:
    spec = recipe.objective
    of = plan.teacher.payload + ("" if plan.teacher.k is None else f" {plan.teacher.k}")
    text = f"{as_call(spec.divergence)} under {as_call(spec.gate)}, beta {plan.objective.beta:g}, from a {of} teacher"
    parts = exactness.of(plan.objective, plan.teacher.payload, k=plan.teacher.k)
    bounds = [
        f"the {part} is a {one.verdict}: {one.reason}"
        for part, one in parts.items()
        if "bound" in one.verdict
    ]
    return ". ".join([text, *bounds, *departure_warnings(recipe)])


def _text(plan: Plan) -> str:
    examples = plan.examples
    found = inspect.check(examples, held_out=plan.heldout)
    ends = ends_in(plan)
    whole = sum(closed(example, ends) for example in examples)
    text = (
        f"{found.examples:,} samples, {found.trained_tokens:,} of {found.tokens:,} tokens trained, "
        f"{found.shortest} to {found.longest} tokens; {whole:,} end with a trained end of sequence"
    )
    return " ".join([f"{text}; {len(plan.heldout):,} held out.", *plan.text.warnings, *found.warnings])


def ends_in(plan: Plan) -> frozenset[int]:
    """The tokens that end a turn in a plan's text."""
    found = plan.text.ends | eos_ids_of(plan.tokenizer)
    return found.union(*plan.text.template.ends.values())


def closed(example: Example, ends: Collection[int]) -> bool:
    """Whether the last token that is trained ends a turn or the text."""
    trained = [index for index, one in zip(example.input_ids, example.completion, strict=True) if one]
    return bool(trained) and trained[-1] in ends


def _masks(plan: Plan) -> str:
    """Two samples, what is trained on between [[ and ]], what is said of an image between << and >>."""
    shown = []
    for example in plan.sources[0].examples[:SHOWN]:
        parts = inspect.pieces(example, plan.tokenizer)
        marks = {"": "{}", "trained": "[[{}]]", "image": "<<{}>>"}
        text = "".join(marks[kind].format(piece) for piece, kind in parts)
        shown.append(f"{example.origin}: {text if len(text) <= 400 else text[:200] + ' ... ' + text[-200:]}")
    return "\n".join(shown)


def _memory(recipe: Any, found: list[Memory], device: torch.device) -> str:
    memory = estimate(recipe, device=device)
    found.append(memory)
    need, free = memory.total, free_memory(device)
    text = ", ".join(
        f"{name.replace('_', ' ')} {size / 2**30:.2f}" for name, size in memory.as_dict().items() if size
    )
    if free is not None and need - memory.process > free:
        raise ResourceError(
            f"a process needs about {need / 2**30:.2f} GiB ({text}), and {free / 2**30:.2f} GiB are free. "
            "Use a smaller training.batch_size or max_length, training.lora, or gradient_checkpointing: true."
        )
    return f"GiB: {text}" + ("" if free is None else f"; {free / 2**30:.2f} free")


def _disk(recipe: Any, memory: Memory) -> str:
    training = recipe.training
    copies = 0 if training.save_every is None else training.keep + 1  # one more while it is written
    need = copies * memory.saved + memory.student
    above = Path(training.output_dir)
    while not above.exists():
        above = above.parent
    free = shutil.disk_usage(above).free
    text = f"{copies} checkpoints of {memory.saved:,} bytes and the student: {need:,} bytes, {free:,} free"
    if need > free:
        raise ResourceError(
            f"{text}. Free some space, name another training.output_dir, or lower training.keep."
        )
    return text


def _teacher(assembly: Assembly) -> str:
    started = time.perf_counter()
    rows = inside(
        assembly.student, lambda: assembly.teacher(assembly.probe, supervised(assembly.probe).position)
    )
    wait_for(assembly.probe.input_ids.device)
    seconds = time.perf_counter() - started
    if isinstance(rows, LiveRows):
        bad = int((~torch.isfinite(rows.hidden)).any(-1).sum())
        if bad:
            raise NumericsError(
                f"{bad} of {rows.hidden.shape[0]} rows of the teacher are not finite. Load it in float32 or bfloat16, "
                "or check its weights."
            )
    n = supervised(assembly.probe).position.shape[0]
    return f"{n} rows of {assembly.probe.stream.shape[0]} samples in {seconds:.2f} s"


def _tar(assembly: Assembly, recipe: Any) -> str:
    def tar_under(objective: Any) -> float:
        seed, precision = recipe.training.seed, assembly.precision
        of = (assembly.student, assembly.teacher, assembly.probe, objective)
        return tar_of(probe(*of, seed=seed, precision=precision), assembly.probe)

    width = min(head_of(assembly.student).width, assembly.teacher_plan.k or head_of(assembly.student).width)
    found = []
    for k in KS:
        if k <= width:
            objective = replace(assembly.objective, verifier={"name": "greedy_topk", "k": k})
            found.append(f"k = {k}: {tar_under(objective):.3f}")
    tar = tar_under(assembly.objective)
    text = f"at step 0, greedy_topk {', '.join(found)}; the recipe's own verifier: {tar:.3f}."
    return text + (f" {cold(tar)}" if tar < COLD_TAR and assembly.beta.start == assembly.beta.end < 1 else "")


def _gate(assembly: Assembly) -> str:
    """The advice for the pair; never a failure."""
    of = (assembly.student, assembly.teacher, assembly.probe)
    signs = signs_of(*of, precision=assembly.precision)
    return advice(signs, sum(p.numel() for p in assembly.student.parameters()), Table.read())


def _step(assembly: Assembly, recipe: Any, device: torch.device) -> str:
    """An optimizer step of one micro-batch on the device of the run, and how long the run would take by it.

    On an accelerator the second step is timed: the first compiles kernels.
    """
    training = recipe.training
    ledger = Ledger(
        assembly.objective,
        recipe.objective.reduction,
        assembly.beta,
        seed=training.seed,
        streams=assembly.streams,
        device=device,
    )
    model = DistillationModel(
        assembly.student, assembly.teacher, options=replace(assembly.options, compiled=False),
        offload=training.activation_offload,
    )  # fmt: skip
    feed, lines = feed_of(assembly), []
    clock = [time.perf_counter()]

    def read_clock(_: int) -> bool:
        wait_for(device)
        clock.append(time.perf_counter())
        return False

    with tempfile.TemporaryDirectory() as empty:  # the Trainer makes its folder, and a run's stays as it is
        one = training.model_copy(update={"output_dir": empty, "gradient_accumulation": 1, "log_every": 1})
        steps = 1 if device.type == "cpu" else 2
        args = training_arguments(one, steps=steps, precision=assembly.precision, device=device)
        trainer = LedgerTrainer(model, feed, ledger, args, on_line=lines.append, after_step=read_clock)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    seconds = clock[-1] - clock[-2]
    if ledger.skipped:
        raise NumericsError(
            f"the first step's loss ({ledger.last['loss']}) or gradient norm ({ledger.grad_norm}) is not finite. "
            "Train in float32, or check the models."
        )
    steps = steps_of(training, feed)
    whole = seconds * steps * training.gradient_accumulation
    line = lines[0]
    return (
        f"loss {line['loss']:.4g}, gradient norm {line['grad_norm']:.4g}; {seconds:.2f} s a micro-batch on {device}, "
        f"about {whole / 3600:.2f} h for {steps:,} steps"
    )


def _ranks(assembly: Assembly) -> str:
    """After one step with averaged gradients every rank has the same weights, if the gradients were equal."""
    checksum = int(weights_checksum(assembly.student)[:12], 16)
    if total([checksum])[0] != checksum * ranks():
        raise NumericsError("after one step the ranks' weights differ: their gradients were not averaged.")
    return f"{ranks()} ranks have the same weights after one step"
