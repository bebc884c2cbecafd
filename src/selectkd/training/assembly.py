"""The composition root: a recipe's names become objects here alone, after ``checks.prepare`` has tried them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from selectkd.config.departures import departure_warnings
from selectkd.data.collate import collate
from selectkd.data.order import BatchOptions, Epoch, Padded
from selectkd.data.render import pad_id_of
from selectkd.data.sources import Source, batches
from selectkd.data.streaming import StreamEpoch
from selectkd.data.supervised import supervised
from selectkd.data.vision import Vision
from selectkd.errors import ConfigError
from selectkd.loss.options import LossOptions
from selectkd.loss.plan import Extra, StreamSpec
from selectkd.models.cut import CutReport, cut_student
from selectkd.models.fake_quantized import fake_quantize
from selectkd.models.head import head_of
from selectkd.models.layers import layers_of
from selectkd.models.load import DTYPES, check_local, load_model
from selectkd.models.lora import add_lora
from selectkd.models.precision import FP32, Precision, bf16_warnings, precision_of
from selectkd.models.quantized import BitsAndBytes, is_quantized, quantized
from selectkd.models.removals import removals_of
from selectkd.models.sharded import Spread, shard
from selectkd.models.vision import freeze
from selectkd.objective.objective import Objective
from selectkd.objective.schedules import BetaSchedule
from selectkd.rollouts.from_recipe import writer_for
from selectkd.rollouts.streams import options_of
from selectkd.rollouts.writer import RolloutWriter
from selectkd.teachers.adapters_off import AdaptersOffPlan
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.model import shared_rows
from selectkd.teachers.protocol import Teacher, TeacherPlan
from selectkd.training.activations import checkpoint_activations
from selectkd.training.checks import Plan, prepare
from selectkd.training.preflight.estimate import check_student
from selectkd.training.recipe_text import Reading
from selectkd.training.record.metrics import check_loggers

CUT_SAMPLES, CUT_TOKENS = 64, 384
"""Held-out samples that are looked at for the text a cut is measured on, and its tokens: a choice takes as long as this
text is (docs/log.md).
"""

ITS_OWN_TEACHER = (
    "the student begins as its own teacher (adapters_off), where every divergence is 0 and so is its gradient: nothing "
    "will move it. Give it something to learn, objective.language_model: 1.0 for the text's own tokens, or a second "
    "teacher."
)


NO_HELDOUT_TEXT = (
    "there is no held-out text, so the student's layers are chosen on the first training samples."
)


@dataclass
class Assembly:
    """Everything a run needs. taid_follows: TAID's t is not fixed but follows its schedule. ``heldout`` and ``probe``
    are micro-batches of text; heldout is empty without any. losses: of the streams, where they differ; extras: what
    changes the terms of the loss; writer: writes the text of a step, None where all of it is the data set's.
    """

    teacher: Teacher
    student: nn.Module
    tokenizer: Any
    objective: Objective
    beta: BetaSchedule
    taid_follows: bool
    micro_batches: Callable[[int], Sequence[Any]]
    streams: tuple[str, ...]
    sources: list[Source]
    heldout: Padded
    probe: Any
    teacher_plan: TeacherPlan
    student_source: str
    student_revision: str | None
    kept: list[int] | None = None
    cut: CutReport | None = None
    warnings: list[str] = field(default_factory=list)
    options: LossOptions = field(default_factory=LossOptions)
    losses: list[StreamSpec] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    writer: RolloutWriter | None = None
    precision: Precision = FP32
    text: Reading | None = None

    @property
    def vision(self) -> Vision | None:
        """The processor of a student that sees images."""
        return None if self.text is None else self.text.vision


def assemble(
    recipe: Any,
    *,
    device: torch.device | str = "cpu",
    stage: Callable[..., None] | None = None,
    kept: Sequence[int] | None = None,
    plan: Plan | None = None,
    date: str | None = None,
) -> Assembly:
    """The objects of a recipe, everything checked that can be before any weight loads. ``stage`` hears what is going
    on. plan: what ``prepare`` made of the recipe, where that is done.

    kept: the layers that an earlier part of this run chose for a student cut from its teacher; None to choose. date:
    the one that its templates were given.
    Raises ConfigError for names, parameters and tokenizers that cannot work, DataError for text that cannot.
    """
    say = stage if stage is not None else lambda *_: None
    check_loggers(recipe.training.report_to)
    check_local(*recipe.models)
    say("reading tokenizers and text")
    plan = prepare(recipe, device=device, date=date, stage=stage) if plan is None else plan
    pad = pad_id_of(plan.tokenizer)
    samples = plan.heldout or plan.examples
    measured = plan.heldout[: recipe.data.evaluation_limit]
    check_student(recipe)
    student = _student(recipe, plan, samples, device, say, kept)
    teacher = _teacher(recipe, plan, student.model, device, say)
    in_probe = samples[: recipe.training.probe_samples]
    itself = isinstance(plan.teacher, AdaptersOffPlan) and not recipe.objective.language_model
    warnings = [*plan.text.warnings, *departure_warnings(recipe), *student.warnings]
    return Assembly(
        teacher=teacher,
        student=student.model,
        tokenizer=plan.tokenizer,
        objective=plan.objective,
        beta=plan.beta,
        taid_follows=plan.taid,
        micro_batches=partial(epoch_of, plan.sources, recipe, pad),
        streams=tuple(stream.name for stream in plan.streams),
        sources=plan.sources,
        heldout=Padded(measured, pad_id=pad, batch_size=recipe.training.batch_size),
        probe=collate(in_probe, pad_id=pad).to(device) if in_probe else None,
        teacher_plan=plan.teacher,
        student_source=student.source,
        student_revision=student.revision,
        kept=student.kept,
        cut=student.cut,
        warnings=[*warnings, ITS_OWN_TEACHER] if itself else warnings,
        options=options_of(recipe, plan.losses, plan.extras),
        losses=plan.losses,
        extras=plan.extras,
        writer=_writer(recipe, plan, student.model),
        precision=plan.precision,
        text=plan.text,
    )


def _writer(recipe: Any, plan: Plan, student: nn.Module) -> RolloutWriter | None:
    return writer_for(
        recipe,
        plan.streams,
        student,
        plan.teacher,
        plan.tokenizer,
        precision=plan.precision,
        vision=plan.text.vision,
    )


@dataclass
class _Student:
    """A student on its device, where it came from, and for a cut one its layers and how they were chosen."""

    model: nn.Module
    source: str
    revision: str | None
    kept: list[int] | None = None
    cut: CutReport | None = None
    warnings: list[str] = field(default_factory=list)


def _student(
    recipe: Any,
    plan: Plan,
    samples: Sequence[Any],
    device: torch.device | str,
    say: Callable[[str], None],
    kept: Sequence[int] | None,
) -> _Student:
    """The student as it trains: loaded or cut, with its adapters."""
    training, precision = recipe.training, plan.precision
    # adapters sit on weights that do not train
    dtype = precision.weights if training.lora is None else precision.frozen
    if recipe.student.model is not None:
        say("loading the student")
        student = _loaded(recipe, dtype, device)
    else:
        student = _cut(recipe, plan, samples, dtype, device, say, kept)
    if training.fake_quantization is not None:
        fake_quantize(student.model, **training.fake_quantization.model_dump())
    freeze(student.model, training.freeze)
    if training.gradient_checkpointing:
        checkpoint_activations(student.model)
    if training.lora is None and is_quantized(student.model):
        raise ConfigError(
            f"{student.source} is stored in few bits, which cannot train. Set training.lora, or name a student in "
            "bfloat16 or float32."
        )
    if training.lora is not None:
        in_fp32 = precision.weights == "float32"
        student.model = add_lora(student.model, **training.lora.model_dump(), in_fp32=in_fp32)
    trained = [p for p in student.model.parameters() if p.requires_grad]
    student.warnings += bf16_warnings(precision, trained, training.learning_rate)
    return student


def _loaded(recipe: Any, dtype: str, device: torch.device | str) -> _Student:
    spec, spread = recipe.student, recipe.training.sharding and Spread.of(recipe.training.sharding)
    loaded = load_model(
        spec.model, dtype=dtype, revision=spec.revision, attn_implementation=spec.attn_implementation,
        spread=spread, quantization=_bits_of(recipe, device),
    )  # fmt: skip
    model = loaded.model if spread else loaded.on(device).model
    return _Student(model, loaded.source, loaded.revision)


def _bits_of(recipe: Any, device: torch.device | str) -> BitsAndBytes | None:
    """How the student's base is stored, None for whole weights; the products are as the run computes."""
    spec = recipe.student.quantization
    if spec is None:
        return None
    precision = precision_of(recipe.training.precision, device)
    products = DTYPES[spec.compute_dtype or ("bfloat16" if precision.autocasts else precision.weights)]
    return BitsAndBytes(spec.name, spec.type, spec.double, products, device)


def _cut(
    recipe: Any,
    plan: Plan,
    samples: Sequence[Any],
    dtype: str,
    device: torch.device | str,
    say: Callable[..., None],
    kept: Sequence[int] | None,
) -> _Student:
    """A student of some layers of its teacher; kept: those that were chosen before, None to choose."""
    spec = recipe.student.from_teacher
    say("loading the teacher")
    loaded = plan.teacher.loaded()
    loaded.model.to(device)
    choose = spec.choose if kept is None else list(kept)
    measured = choose == "measured"
    texts = list(_cut_batches(cut_text(samples[:CUT_SAMPLES]), plan.tokenizer)) if measured else []
    known = removals_of(loaded.model, texts) if measured else None

    whole = len(layers_of(loaded.model))

    def removed(layer: int, left: tuple[int, ...], kl: float) -> None:
        name = f"choosing layers: {len(left)} left on the way to {spec.layers}, held-out KL {kl:.3f}"
        say(name, whole - spec.layers, whole - len(left))

    if measured:
        say(f"choosing {spec.layers} of {whole} layers by measured KL", whole - spec.layers)
    model, layers, report = cut_student(
        loaded.model, spec.layers, choose, texts, known=known, on_progress=removed
    )
    model.requires_grad_(True)
    model.to(DTYPES[dtype])
    sharding = recipe.training.sharding
    model = shard(model, Spread.of(sharding)) if sharding else model
    bits = _bits_of(recipe, device)
    model = model if bits is None else quantized(model, bits)
    source = f"{loaded.source} with layers {', '.join(map(str, layers))}"
    warnings = [NO_HELDOUT_TEXT] if measured and not plan.heldout else []
    return _Student(model, source, loaded.revision, layers, report, warnings)


def _teacher(
    recipe: Any, plan: Plan, student: nn.Module, device: torch.device | str, say: Callable[[str], None]
) -> Teacher:
    """The teacher, with the reference student of the recipe beside it."""
    reference = None
    if recipe.reference is not None:
        say("loading the reference student")
        loaded = load_model(
            recipe.reference.model,
            dtype=recipe.reference.dtype or plan.precision.frozen,
            revision=recipe.reference.revision,
        )
        widths = {"teacher_width": head_of(loaded.model).width, "student_width": head_of(student).width}
        shared = shared_rows(loaded.tokenizer, plan.tokenizer, **widths)
        reference = LiveTeacher(loaded.model.to(device), shared=shared)
    if plan.teacher.payload not in ("live", "aligned"):
        say("opening the teacher")
    elif not isinstance(plan.teacher, AdaptersOffPlan) and recipe.student.model is not None:
        say("loading the teacher")  # a cut has loaded it
    return plan.teacher.open(plan.tokenizer, student=student, reference=reference)


def cut_text(samples: Sequence[Any]) -> list[Any]:
    """The samples that a cut is measured on: those that come first and fit into CUT_TOKENS, else the shortest."""
    chosen, tokens = list[Any](), 0
    for sample in samples:
        if tokens + len(sample.input_ids) <= CUT_TOKENS:
            chosen.append(sample)
            tokens += len(sample.input_ids)
    return chosen or sorted(samples, key=lambda sample: len(sample.input_ids))[:1]


def _cut_batches(examples: Sequence[Any], tokenizer: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    for batch in Padded(examples, pad_id=pad_id_of(tokenizer), batch_size=4):
        yield batch.model_inputs(), supervised(batch).position


def epoch_of(sources: Sequence[Source], recipe: Any, pad: int, epoch: int) -> Epoch | StreamEpoch:
    """The batches of an epoch."""
    data, training = recipe.data, recipe.training
    options = BatchOptions(
        training.batch_size, training.seed, pad, data.packing, training.max_length, data.bucket
    )
    return batches(sources, options, epoch)
