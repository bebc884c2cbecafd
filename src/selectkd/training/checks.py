"""The checks of a recipe before any weight loads: names, parameters, tokenizers, text, and whether they fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from selectkd.data.alignment import align
from selectkd.data.examples import Examples
from selectkd.data.sources import Source
from selectkd.errors import ConfigError, DataError
from selectkd.loss.block_compiled import check_compiled
from selectkd.loss.plan import Extra, StreamSpec
from selectkd.models.load import check_model, load_tokenizer
from selectkd.models.packing import check_packing
from selectkd.models.precision import Precision, check_launched, precision_of
from selectkd.models.quantized import check_quantization
from selectkd.objective.objective import Objective
from selectkd.objective.registry import name_of
from selectkd.objective.schedules import BetaSchedule
from selectkd.objective.verifiers import traits_of
from selectkd.rollouts.streams import Stream, check_labels, extras_of, losses_of, streams_of
from selectkd.teachers import exactness
from selectkd.teachers.aligned import AlignedPlan
from selectkd.teachers.cache.plan import CachePlan
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.open import plan_teacher
from selectkd.teachers.protocol import Payload, TeacherPlan
from selectkd.teachers.several import SeveralPlan
from selectkd.training.optimizer import check_optimizer
from selectkd.training.recipe_text import Reading, read_text
from selectkd.training.vision import check_images


@dataclass(frozen=True)
class Plan:
    """The part of a recipe that needs no weights, checked: objective, tokenizers, text."""

    objective: Objective
    beta: BetaSchedule
    taid: bool
    tokenizer: Any
    teacher: TeacherPlan
    sources: list[Source]
    heldout: Examples
    streams: list[Stream]
    losses: list[StreamSpec]
    extras: list[Extra]
    precision: Precision
    text: Reading

    @property
    def examples(self) -> Examples:
        """The samples of all sources that are trained on."""
        return Examples.joined([source.examples for source in self.sources])

    @property
    def of_streams(self) -> list[tuple[str, Objective]]:
        """(name of a stream, what it makes of the objective), for each that has its own; a selector is one more."""
        named = zip(self.streams, self.losses, strict=False)  # no losses where no stream has its own
        return [(stream.name, one) for stream, spec in named for one in spec.objectives_on(self.objective)]


def check_stored(plan: Plan, recipe: Any, payload: Payload, *, k: int | None, source: str) -> None:
    """ConfigError where a cache of ``payload`` could not give a run what its objectives, extras and reference ask."""
    temperature = recipe.objective.temperature
    for stream, one in [(None, plan.objective), *plan.of_streams]:
        with _naming(stream):
            exactness.check(one, payload, k=k, temperature=temperature, source=source)
            exactness.check_edge(one, payload, k=k)
    check_labels(plan.extras, payload, source)
    if recipe.reference is not None:
        exactness.check_reference(payload, source=source)


@contextmanager
def _naming(stream: str | None) -> Iterator[None]:
    """Names the stream whose objective a ConfigError is about; None: the run's own."""
    try:
        yield
    except ConfigError as error:
        if stream is None:
            raise
        raise ConfigError(f"text of {stream}: {error}") from error


def prepare(
    recipe: Any,
    teacher: TeacherPlan | None = None,
    *,
    device: torch.device | str = "cpu",
    date: str | None = None,
    stage: Callable[[str], None] | None = None,
) -> Plan:
    """All of a recipe that needs no weights: names and parameters, tokenizers and their alignment, text.

    teacher: in place of the recipe's, for a cache that is still to be built. device: where the run will be. date,
    stage: as of ``read_text``.
    """
    precision, sharding = precision_of(recipe.training.precision, device), recipe.training.sharding
    check_launched(precision)
    _check_packages(recipe)
    teacher = teacher or plan_teacher(recipe.teacher, dtype=precision.frozen, sharding=sharding)
    if recipe.student.model is None and teacher.model is None:
        raise ConfigError(
            f"student.from_teacher cuts the teacher's model, but {teacher.source} does not say where that is. "
            "Name the student: student: {model: ...}."
        )
    tokenizer: Any = (
        load_tokenizer(recipe.student.model, revision=recipe.student.revision)
        if recipe.student.model
        else teacher.tokenizer()
    )
    objective, beta, taid = objective_of(recipe.objective, tokenizer)
    check_objective(objective, recipe, teacher, width=len(tokenizer))
    _check_models(recipe, teacher, tokenizer, objective)
    routes = teacher.routes if isinstance(teacher, SeveralPlan) else None
    text = read_text(
        recipe, tokenizer, date=date, routes=routes, stage=stage, vision=check_images(recipe, teacher)
    )
    streams = streams_of(
        [source.name for source in text.sources],
        recipe.data.policies,
        [source.written_by for source in recipe.data.sources],
    )
    losses, extras = losses_of(recipe, streams), extras_of(recipe)
    check_labels(extras, teacher.payload, teacher.source)
    plan = Plan(
        objective, beta, taid, tokenizer, teacher, text.sources, text.heldout, streams, losses, extras, precision, text
    )  # fmt: skip
    for stream, one in plan.of_streams:
        with _naming(stream):
            check_objective(one, recipe, teacher, width=len(tokenizer))
    check_references([objective, *(one for _, one in plan.of_streams)], recipe)
    _check_text(recipe, teacher, text, streams)
    return plan


def _check_packages(recipe: Any) -> None:
    """ConfigError for an optimizer, or a way to store the student, whose package is not installed."""
    check_optimizer(recipe.training.optimizer)
    check_quantization(recipe.student.quantization and recipe.student.quantization.name)


def check_objective(objective: Objective, recipe: Any, teacher: TeacherPlan, *, width: int) -> None:
    """ConfigError for an objective that this teacher, or a vocabulary of ``width`` tokens, cannot give."""
    temperature = recipe.objective.temperature
    exactness.check(objective, teacher.payload, k=teacher.k, temperature=temperature, source=teacher.source)
    exactness.check_edge(objective, teacher.payload, k=teacher.k)
    for gate in objective.gates:
        need = traits_of(gate).teacher_tokens
        if need is not None and need > width:
            key = "objective.verifier.k" if gate is objective.verifier else "the k of that route's gate"
            raise ConfigError(
                f"{name_of(gate)} needs the teacher's {need} best tokens; "
                f"the vocabulary has {width}. Set {key} to {width} or less."
            )
    if recipe.training.compile_loss is True:
        whole = teacher.payload in ("live", "hidden") and not isinstance(teacher, SeveralPlan)
        check_compiled(objective.divergence, whole=whole)


def check_references(
    objectives: Sequence[Objective],
    recipe: Any,
    remedy: str = "Name one: reference: {model: FOLDER}, for instance a student distilled with forward_kl before.",
) -> None:
    """ConfigError where a selector compares with a reference student and there is none."""
    for objective in objectives:
        if objective.traits.needs_reference and recipe.reference is None:
            raise ConfigError(
                f"objective.selector = {name_of(objective.verifier)} compares with a reference student. {remedy}"
            )


def _check_models(recipe: Any, teacher: TeacherPlan, tokenizer: Any, objective: Objective) -> None:
    """ConfigError for models whose tokenizers, attention or kinds do not fit."""
    student, reference = recipe.student, recipe.reference
    if isinstance(teacher, AlignedPlan):
        teacher.check_objective(objective)
    if student.model is not None:
        teacher.check_tokenizer(tokenizer)
        where = "student.attn_implementation"
        check_model(student.model, student.attn_implementation, revision=student.revision, where=where)
    if reference is not None:
        exactness.check_reference(teacher.payload, source=teacher.source)
        align(load_tokenizer(reference.model, revision=reference.revision), tokenizer)
    if recipe.data.packing:
        _check_packing(recipe, teacher)


def _check_text(recipe: Any, teacher: TeacherPlan, text: Reading, streams: Sequence[Stream]) -> None:
    """ConfigError, DataError or an error of the teacher for text that it cannot answer for."""
    for plan in teacher.plans if isinstance(teacher, SeveralPlan) else [teacher]:
        if isinstance(plan, CachePlan):
            plan.check_template(text.template)
            plan.check_images(text.vision)
    examples = Examples.joined([source.examples for source in text.sources])
    if not examples.column("trained").any():
        raise DataError("no sample has a token to train on. Look at the masks with `selectkd data show`.")
    if isinstance(teacher, SeveralPlan):
        teacher.check_streams([text.sources[stream.source].name for stream in streams])
    if isinstance(teacher, CachePlan) and any(policy.name != "dataset" for policy in recipe.data.policies):
        raise ConfigError(
            f"{teacher.source} holds the teacher's rows of the data set's text alone, but a policy writes other "
            "text. Use teacher: {model: ...}, or policy: dataset."
        )
    teacher.check_text(Examples.joined([examples, text.heldout]))


def _check_packing(recipe: Any, teacher: TeacherPlan) -> None:
    """ConfigError where a model that reads packed rows could not keep their samples apart."""
    length = recipe.training.max_length
    plans = teacher.plans if isinstance(teacher, SeveralPlan) else [teacher]
    teachers = [("the teacher", one, one.wanted_revision) for one in plans if isinstance(one, ModelPlan)]
    others = (("the student", recipe.student), ("the reference", recipe.reference))
    for role, one, revision in [*teachers, *((r, o, o.revision) for r, o in others if o and o.model)]:
        check_packing(one.model, length, role=role, revision=revision)


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
