"""The composition root: a recipe's names become objects here alone; what can fail fails before weights load."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from selectkd.config.departures import departure_warnings
from selectkd.data.alignment import align
from selectkd.data.collate import collate
from selectkd.data.render import pad_id_of
from selectkd.data.sources import Source, batches
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, DataError
from selectkd.loss.block_compiled import check_compiled
from selectkd.loss.options import LossOptions
from selectkd.loss.plan import Extra, StreamSpec
from selectkd.models.cut import CutReport, cut_student
from selectkd.models.head import head_of
from selectkd.models.load import DTYPES, check_local, check_model, load_model, load_tokenizer
from selectkd.models.lora import add_lora
from selectkd.models.packing import check_packing
from selectkd.models.precision import FP32, Precision, bf16_warnings, check_launched, precision_of
from selectkd.models.sharded import Spread, shard
from selectkd.objective.objective import Objective
from selectkd.objective.schedules import BetaSchedule
from selectkd.rollouts.from_recipe import writer_for
from selectkd.rollouts.streams import Stream, check_labels, extras_of, losses_of, options_of, streams_of
from selectkd.rollouts.writer import RolloutWriter
from selectkd.teachers import exactness
from selectkd.teachers.adapters_off import AdaptersOffPlan
from selectkd.teachers.aligned import AlignedPlan
from selectkd.teachers.cache.plan import CachePlan
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.model import ModelPlan, shared_rows
from selectkd.teachers.open import plan_teacher
from selectkd.teachers.protocol import Teacher, TeacherPlan
from selectkd.teachers.several import SeveralPlan
from selectkd.training.activations import checkpoint_activations
from selectkd.training.optimizer import check_optimizer
from selectkd.training.preflight.estimate import check_student
from selectkd.training.recipe_text import Reading, read_text
from selectkd.training.record.metrics import check_loggers

CUT_SAMPLES = 4
"""Held-out samples a cut is measured on: some 250 positions; its time grows with them (docs/log.md)."""

ITS_OWN_TEACHER = (
    "the student begins as its own teacher (adapters_off), where every divergence is 0 and so is its gradient: nothing "
    "will move it. Give it something to learn, objective.language_model: 1.0 for the text's own tokens, or a second "
    "teacher."
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
    micro_batches: Callable[[int], Iterable[Any]]
    streams: tuple[str, ...]
    sources: list[Source]
    heldout: list[Any]
    probe: Any
    teacher_plan: TeacherPlan
    student_source: str
    student_revision: str | None
    kept: list[int] | None = None
    cut: CutReport | None = None
    told: list[str] = field(default_factory=list)
    options: LossOptions = field(default_factory=LossOptions)
    losses: list[StreamSpec] = field(default_factory=list)
    extras: list[Extra] = field(default_factory=list)
    writer: RolloutWriter | None = None
    precision: Precision = FP32
    text: Reading | None = None


@dataclass(frozen=True)
class Plan:
    """The part of a recipe that needs no weights, checked: objective, tokenizers, text."""

    objective: Objective
    beta: BetaSchedule
    taid: bool
    tokenizer: Any
    teacher: TeacherPlan
    sources: list[Source]
    heldout: list[Any]  # examples
    streams: list[Stream]
    losses: list[StreamSpec]
    extras: list[Extra]
    precision: Precision
    text: Reading


def assemble(
    recipe: Any,
    *,
    device: torch.device | str = "cpu",
    stage: Callable[[str], None] | None = None,
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
    say = stage if stage is not None else lambda _: None
    check_loggers(recipe.training.report_to)
    check_local(*recipe.models)
    say("reading tokenizers and text")
    plan = prepare(recipe, device=device, date=date) if plan is None else plan
    pad = pad_id_of(plan.tokenizer)
    heldout = list(padded(plan.heldout, pad_id=pad, batch_size=recipe.training.batch_size))
    examples = [example for source in plan.sources for example in source.examples]
    told = [*plan.text.told, *departure_warnings(recipe)]

    check_student(recipe)
    student, source, revision, layers, cut = _student(recipe, plan, examples, device, say, told, kept)
    if recipe.training.gradient_checkpointing:
        checkpoint_activations(student)
    if recipe.training.lora is not None:
        in_fp32 = plan.precision.weights == "float32"
        student = add_lora(student, **recipe.training.lora.model_dump(), in_fp32=in_fp32)
    trained = [p for p in student.parameters() if p.requires_grad]
    told += bf16_warnings(plan.precision, trained, recipe.training.learning_rate)

    reference = None
    if recipe.reference is not None:
        say("loading the reference student")
        own = load_model(
            recipe.reference.model,
            dtype=recipe.reference.dtype or plan.precision.frozen,
            revision=recipe.reference.revision,
        )
        widths = {"teacher_width": head_of(own.model).width, "student_width": head_of(student).width}
        shared = shared_rows(own.tokenizer, plan.tokenizer, **widths)
        reference = LiveTeacher(own.model.to(device), shared=shared)
    if plan.teacher.payload not in ("live", "aligned"):
        say("opening the teacher")
    elif isinstance(plan.teacher, AdaptersOffPlan):
        if not recipe.objective.language_model:
            told.append(ITS_OWN_TEACHER)
    elif recipe.student.model is not None:  # a cut has loaded it
        say("loading the teacher")
    teacher = plan.teacher.open(plan.tokenizer, student=student, reference=reference)
    samples = (plan.heldout or examples)[: recipe.training.probe_samples]
    probe = collate(samples, pad_id=pad).to(device) if samples else None
    return Assembly(
        teacher=teacher,
        student=student,
        tokenizer=plan.tokenizer,
        objective=plan.objective,
        beta=plan.beta,
        taid_follows=plan.taid,
        micro_batches=partial(epoch_of, plan.sources, recipe, pad),
        streams=tuple(stream.name for stream in plan.streams),
        sources=plan.sources,
        heldout=heldout,
        probe=probe,
        teacher_plan=plan.teacher,
        student_source=source,
        student_revision=revision,
        kept=layers,
        cut=cut,
        told=told,
        options=options_of(recipe, plan.losses, plan.extras),
        losses=plan.losses,
        extras=plan.extras,
        writer=writer_for(
            recipe, plan.streams, student, plan.teacher, plan.tokenizer, precision=plan.precision
        ),
        precision=plan.precision,
        text=plan.text,
    )


def prepare(
    recipe: Any,
    teacher: TeacherPlan | None = None,
    *,
    device: torch.device | str = "cpu",
    date: str | None = None,
) -> Plan:
    """All of a recipe that needs no weights: names and parameters, tokenizers and their alignment, text.

    teacher: in place of the recipe's, for a cache that is still to be built. device: where the run will be. date: as of
    ``read_text``.
    """
    precision = precision_of(recipe.training.precision, device)
    check_launched(precision)
    check_optimizer(recipe.training.optimizer)
    sharding = recipe.training.sharding
    teacher = teacher or plan_teacher(recipe.teacher, dtype=precision.frozen, sharding=sharding)
    named, attention = recipe.student.model, recipe.student.attn_implementation
    if named is None and teacher.model is None:
        raise ConfigError(
            f"student.from_teacher cuts the teacher's model, but {teacher.source} does not say where that is. "
            "Name the student: student: {model: ...}."
        )
    tokenizer: Any = load_tokenizer(named, revision=recipe.student.revision) if named else teacher.tokenizer()
    objective, beta, taid = objective_of(recipe.objective, tokenizer)
    exactness.check(
        objective,
        teacher.payload,
        k=teacher.k,
        temperature=recipe.objective.temperature,
        source=teacher.source,
    )
    exactness.check_edge(objective, teacher.payload, k=teacher.k)
    if isinstance(teacher, AlignedPlan):
        teacher.check_objective(objective)
    if named is not None:
        teacher.check_tokenizer(tokenizer)
        check_model(named, attention, revision=recipe.student.revision, where="student.attn_implementation")
    if recipe.reference is not None:
        exactness.check_reference(teacher.payload, source=teacher.source)
        align(load_tokenizer(recipe.reference.model, revision=recipe.reference.revision), tokenizer)
    need, width = objective.teacher_tokens, len(tokenizer)
    if need is not None and need > width:
        raise ConfigError(
            f"{type(objective.verifier).__name__} needs the teacher's {need} best tokens; "
            f"the vocabulary has {width}. Set objective.verifier.k to {width} or less."
        )
    if recipe.data.packing:
        _check_packing(recipe, teacher)
    routed = teacher.route_of if isinstance(teacher, SeveralPlan) and teacher.when is not None else None
    text = read_text(recipe, tokenizer, date=date, route=routed)
    sources, heldout = text.sources, text.heldout
    for plan in teacher.plans if isinstance(teacher, SeveralPlan) else [teacher]:
        if isinstance(plan, CachePlan):
            plan.check_template(text.template)
    if not any(any(example.completion) for source in sources for example in source.examples):
        raise DataError("no sample has a token to train on. Look at the masks with `selectkd data show`.")
    streams = streams_of(
        [source.name for source in sources],
        recipe.data.policies,
        [source.written_by for source in recipe.data.sources],
    )
    losses, extras = losses_of(recipe, streams), extras_of(recipe)
    check_labels(extras, teacher.payload, teacher.source)
    for own in [objective, *(one for spec in losses for one in spec.objectives_on(objective))]:
        exactness.check(
            own, teacher.payload, k=teacher.k, temperature=recipe.objective.temperature, source=teacher.source
        )
        if recipe.training.compile_loss:
            whole = teacher.payload in ("live", "hidden") and not isinstance(teacher, SeveralPlan)
            check_compiled(own.divergence, whole=whole)
        if own.traits.needs_reference and recipe.reference is None:
            raise ConfigError(
                f"objective.selector = {type(own.verifier).__name__} compares with a reference student. "
                "Name one: reference: {model: FOLDER}, for instance a student distilled with forward_kl before."
            )
    if isinstance(teacher, SeveralPlan):
        teacher.check_streams([sources[stream.source].name for stream in streams])
    if isinstance(teacher, CachePlan) and any(policy.name != "dataset" for policy in recipe.data.policies):
        raise ConfigError(
            f"{teacher.source} holds the teacher's rows of the data set's text alone, and a policy has other text "
            "written. Use teacher: {model: ...}, or policy: dataset."
        )
    teacher.check_text([*(example for source in sources for example in source.examples), *heldout])
    return Plan(
        objective, beta, taid, tokenizer, teacher, sources, heldout, streams, losses, extras, precision, text
    )


def objective_of(spec: Any, tokenizer: Any) -> tuple[Objective, BetaSchedule, bool]:
    """The objective of a recipe's section, its beta schedule, and whether TAID's t follows its schedule."""
    beta = spec.beta
    schedule = (
        BetaSchedule(beta, beta)
        if isinstance(beta, int | float)
        else BetaSchedule(**beta.model_dump(exclude_none=True))
    )
    objective = Objective(
        spec.divergence,
        spec.gate,
        beta=schedule.start,
        always_accept=always_accepted(spec.always_accept, tokenizer),
        verify_temperature=spec.verify_temperature,
        thin_rejected=spec.thin_rejected,
    )
    return objective, schedule, spec.divergence["name"] == "taid" and "t" not in spec.divergence


def always_accepted(tokens: Sequence[int | str], tokenizer: Any) -> tuple[int, ...]:
    """Token ids for ``always_accept``: ids as they are, ``eos`` as the tokenizer's end of sequence."""
    ids: list[int] = []
    for token in tokens or ():
        if token == "eos":
            if tokenizer.eos_token_id is None:
                raise ConfigError(
                    "objective.always_accept names eos, but the tokenizer has none. Give token ids."
                )
            ids.append(int(tokenizer.eos_token_id))
        elif isinstance(token, int) and 0 <= token < len(tokenizer):
            ids.append(token)
        else:
            raise ConfigError(
                f"objective.always_accept: {token!r} is neither eos nor a token id below {len(tokenizer)}."
            )
    return tuple(ids)


def _check_packing(recipe: Any, teacher: TeacherPlan) -> None:
    """ConfigError where a model that reads packed rows could not keep their samples apart."""
    length = recipe.training.max_length
    plans = teacher.plans if isinstance(teacher, SeveralPlan) else [teacher]
    teachers = [("the teacher", one, one.wanted_revision) for one in plans if isinstance(one, ModelPlan)]
    others = (("the student", recipe.student), ("the reference", recipe.reference))
    for role, one, revision in [*teachers, *((r, o, o.revision) for r, o in others if o and o.model)]:
        check_packing(one.model, length, role=role, revision=revision)


def _student(
    recipe: Any,
    plan: Plan,
    examples: list[Any],
    device: torch.device | str,
    say: Callable[[str], None],
    told: list[str],
    chosen: Sequence[int] | None,
) -> tuple[nn.Module, str, str | None, list[int] | None, CutReport | None]:
    """(student, source, revision, kept layers, how they were chosen)."""
    # what adapters sit on does not train
    dtype = plan.precision.weights if recipe.training.lora is None else plan.precision.frozen
    spec, spread = recipe.student, recipe.training.sharding and Spread.of(recipe.training.sharding)
    if spec.model is not None:
        say("loading the student")
        own = load_model(
            spec.model, dtype=dtype, revision=spec.revision, attn_implementation=spec.attn_implementation,
            spread=spread,
        )  # fmt: skip
        return own.model if spread else own.model.to(device), own.source, own.revision, None, None
    wanted = recipe.student.from_teacher
    say("loading the teacher")
    loaded = plan.teacher.loaded()
    loaded.model.to(device)
    say("choosing the student's layers")
    measured_on = plan.heldout or examples
    choose = wanted.choose if chosen is None else chosen
    if choose == "measured" and not plan.heldout:
        told.append(
            "there is no held-out text, so the student's layers are chosen on the first training samples."
        )
    texts = _cut_batches(measured_on[:CUT_SAMPLES], plan.tokenizer) if choose == "measured" else None
    choose = choose if isinstance(choose, str) else list(choose)

    def removed(layer: int, kept: tuple[int, ...], kl: float) -> None:
        say(f"choosing layers: {len(kept)} left on the way to {wanted.layers}, held-out KL {kl:.3f}")

    student, kept, report = cut_student(loaded.model, wanted.layers, choose, texts, on_progress=removed)
    student.requires_grad_(True)
    student.to(DTYPES[dtype])
    student = shard(student, spread) if spread else student
    return student, f"{loaded.source} with layers {', '.join(map(str, kept))}", loaded.revision, kept, report


def _cut_batches(examples: Sequence[Any], tokenizer: Any) -> Iterator[tuple[Mapping[str, Any], Any]]:
    for batch in padded(examples, pad_id=pad_id_of(tokenizer), batch_size=4):
        yield batch.model_inputs(), supervised(batch).position


def padded(examples: Sequence[Any], *, pad_id: int, batch_size: int) -> Iterator[Any]:
    for start in range(0, len(examples), batch_size):
        yield collate(list(examples[start : start + batch_size]), pad_id=pad_id)


def epoch_of(sources: Sequence[Source], recipe: Any, pad: int, epoch: int) -> Iterable[Any]:
    return batches(
        sources,
        batch_size=recipe.training.batch_size,
        seed=recipe.training.seed,
        epoch=epoch,
        packing=recipe.data.packing,
        bucket=recipe.data.bucket,
        max_length=recipe.training.max_length,
        pad_id=pad,
    )
