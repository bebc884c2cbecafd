"""The text of a recipe as it is trained on: under which chat template, with which ends of turns, and what is held out.

Training, caches, `data` and `doctor` read it here, so that they all see the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from selectkd.config import CacheTeacher, ModelTeacher
from selectkd.data.examples import Examples
from selectkd.data.inspect import shared_prompts
from selectkd.data.jinja_process import asked_for
from selectkd.data.prompts import split
from selectkd.data.render import TextRules
from selectkd.data.routes import Routes
from selectkd.data.sources import Source, dataset_source, streamed_source, without_share
from selectkd.data.template import ChatTemplate, source_of
from selectkd.data.text_cache import TextCache
from selectkd.data.vision import Vision
from selectkd.errors import CacheError, ConfigError
from selectkd.models.ends import end_ids
from selectkd.objective.registry import did_you_mean
from selectkd.teachers.cache.index import INDEX, PLAN, read_index

MEASURED = 1000
"""Held-out records of a streamed source, unless data.evaluation_limit says how many samples are measured."""


@dataclass(frozen=True)
class Reading:
    """The text of a recipe: its sources without what is held out, and that. ends: the tokens that end a turn, beside
    those its template writes itself. vision: the processor of a student that sees images.
    """

    template: ChatTemplate
    ends: frozenset[int]
    sources: list[Source]
    heldout: Examples
    split: list[str] = field(default_factory=list)  # warnings
    vision: Vision | None = None

    @property
    def warnings(self) -> list[str]:
        """Of arguments that the template does not read, of the split, and of each source that lost something."""
        unread = unread_arguments(self.template)
        return [
            *unread,
            *self.split,
            *(line for source in self.sources if (line := lost(source)) is not None),
        ]


def read_text(
    recipe: Any,
    tokenizer: Any,
    *,
    date: str | None = None,
    routes: Routes | None = None,
    limit: int | None = None,
    stage: Callable[[str], None] | None = None,
    vision: Vision | None = None,
) -> Reading:
    """The text of ``recipe`` in tokens of its student. Reads no weights.

    vision: the processor of a student that sees images.

    date: what templates are given where neither the recipe nor its cache says one; default now. routes: the
    teacher of a record, where several are distinguished by it. limit: records of a source at most. stage: hears how
    far the tokenising is. Raises DataError, ConfigError.
    """
    template, ends = template_of(recipe, tokenizer, date=date), ends_of(recipe, tokenizer)
    options: dict[str, Any] = dict(
        tokenizer=tokenizer,
        rules=rules_of(recipe),
        eos_ids=ends,
        template=template,
        routes=routes,
        vision=vision,
        cache=TextCache.at(recipe.data.cache, workers=recipe.data.workers, say=stage),
    )

    def few(reading: dict[str, Any]) -> dict[str, Any]:
        return reading if limit is None else {**reading, "limit": min(limit, reading.get("limit") or limit)}

    read = streamed_source if recipe.data.streaming else dataset_source
    sources = [
        read({**few(spec.reading), "stream": index}, **options)
        for index, spec in enumerate(recipe.data.sources)
    ]
    evaluation = recipe.data.evaluation
    if evaluation is None:
        return Reading(template, ends, sources, Examples.of([]), vision=vision)
    if isinstance(evaluation, int | float) and recipe.data.streaming:
        most = recipe.data.evaluation_limit or MEASURED
        kept = hold_out_streamed(sources, float(evaluation), most, options["cache"])
        return Reading(template, ends, *kept, vision=vision)
    if isinstance(evaluation, int | float):
        return Reading(template, ends, *hold_out(sources, float(evaluation)), vision=vision)
    held_out = dataset_source(few(evaluation.reading), **options).examples
    shared = shared_prompts(Examples.joined([source.examples for source in sources]), held_out)
    return Reading(template, ends, sources, held_out, shared, vision=vision)


def rules_of(recipe: Any) -> TextRules:
    """What a recipe trains of a record, in how many tokens."""
    data = recipe.data
    return TextRules(
        max_length=recipe.training.max_length,
        max_prompt_length=recipe.prompt_limit,
        on_too_long=data.on_too_long,
        on_bad_record=data.on_bad_record,
        train_on=data.train_on,
        train_turns=data.train_turns,
        system=data.system,
        tools=tuple(data.template_arguments.get("tools") or ()),
    )


def template_of(recipe: Any, tokenizer: Any, *, date: str | None = None) -> ChatTemplate:
    """The chat template of a recipe; where it names one, the tokenizer has that from here on and is saved with it."""
    if recipe.data.chat_template is not None:
        tokenizer.chat_template = source_of(recipe.data.chat_template, tokenizer)
    moment = recipe.data.date or _cached(recipe).get("date") or date
    arguments = {name: value for name, value in recipe.data.template_arguments.items() if name != "tools"}
    return ChatTemplate.of(tokenizer, arguments=arguments, moment=moment)


def unread_arguments(template: ChatTemplate) -> list[str]:
    """A warning for each argument of the recipe that the template never reads, so that it changes nothing."""
    sources = (
        [template.source] if isinstance(template.source, str) else list((template.source or {}).values())
    )
    names = {name for source in sources for name in asked_for(source)}
    return [
        f"data.template_arguments.{name}: the chat template reads no such variable, so it has no effect."
        f"{did_you_mean(name, names)}"
        for name in template.arguments
        if sources and name not in names
    ]


def ends_of(recipe: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end a turn for the student and for teachers of its tokenizer, by their generation settings."""
    ends = set(_cached(recipe).get("ends") or ())
    if recipe.student.model is not None:
        ends |= end_ids(recipe.student.model, tokenizer, revision=recipe.student.revision)
    for teacher in recipe.teachers:
        if isinstance(teacher, ModelTeacher) and teacher.cross_tokenizer is not None:
            continue  # its ids are not the student's
        if isinstance(teacher, ModelTeacher | CacheTeacher) and teacher.model is not None:
            if isinstance(teacher, CacheTeacher) and _cached(recipe):
                continue  # what it was built with counts
            ends |= end_ids(teacher.model, tokenizer, revision=teacher.revision)
    return frozenset(ends)


def _cached(recipe: Any) -> dict[str, Any]:
    """What a cache that is there, whole or in the making, says of its text; empty where there is none."""
    for teacher in recipe.teachers:
        for name in (INDEX, PLAN) if isinstance(teacher, CacheTeacher) else ():
            path = Path(teacher.cache).expanduser() / name
            try:
                if path.is_file():
                    return read_index(path)
            except CacheError:  # reported where the cache is opened; a repair reads the other file
                continue
    return {}


def hold_out(sources: Sequence[Source], share: float) -> tuple[list[Source], Examples, list[str]]:
    """A share of the samples of each source held out, the rest to train on, and warnings.

    Hashes of the prompts decide, so that a prompt, its duplicates and its rewordings stand on one side
    (``data.prompts.split``). Of n samples floor(n * share) are held out, or fewer.
    """
    found = split([source.examples.prompts for source in sources], share)
    kept, out = [], []
    for source, chosen in zip(sources, found.held_out, strict=True):
        held_out = np.asarray(chosen, bool)
        out.append(source.examples.where(held_out))
        kept.append(replace(source, examples=source.examples.where(~held_out)))
    held, count = Examples.joined(out), sum(len(source.examples) for source in sources)
    if not held or len(held) == count:
        what = "none" if not held else "all of them"
        raise ConfigError(
            f"data.evaluation = {share} of {count} samples holds {what} out; duplicates of a prompt stay together. "
            f"Give a {'larger' if not held else 'smaller'} share, or a file of its own."
        )
    warnings = []
    if len(held) < 0.95 * share * count - len(sources):
        warnings.append(
            f"data.evaluation = {share}: {len(held):,} of {count:,} samples are held out; more would part the "
            "duplicates of a prompt"
        )
    if not found.whole:
        warnings.append(
            f"data.evaluation = {share}: nearly equal prompts stand on both sides, since too many are alike"
        )
    if found.too_many:
        warnings.append(
            f"data.evaluation = {share}: {found.too_many:,} samples of nearly one prompt are all trained on"
        )
    return kept, held, warnings


def hold_out_streamed(
    sources: Sequence[Source], share: float, most: int, cache: TextCache
) -> tuple[list[Source], Examples]:
    """A share of the prompts of each streamed source held out, and examples of at most ``most`` records of each that
    have one. Equal words are one prompt, whatever their case and punctuation; rewordings are not looked for.
    """
    parts = [without_share(source, share, most, cache) for source in sources]
    held = Examples.joined([examples for _, examples in parts])
    if not held:
        raise ConfigError(
            f"data.evaluation = {share} holds none of the records out. Give a larger share, or a file of its own."
        )
    return [source for source, _ in parts], held


def lost(source: Source) -> str | None:
    """What a source lost on its way to tokens, None where nothing."""
    counts = source.counts
    found = [
        f"{counts[name]:,} {name}"
        for name in counts
        if name not in ("read", "kept", "truncated") and counts[name]
    ]
    return f"{source.name}: of {counts.get('read', 0):,} records {', '.join(found)}" if found else None
