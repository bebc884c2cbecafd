"""``selectkd data check``, ``show`` and ``align``: what would be trained on, before anything is."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.overrides import OfRecipe
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import clean, paint, say, write
from selectkd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from selectkd.config import Recipe
    from selectkd.data.examples import Examples
    from selectkd.data.sources import Source

READING = ("path", "split", "config", "revision", "storage_options", "format", "limit")
"""The keys of a source that say which records are read."""
LARGEST = 1_000_000
"""Bytes of a JSON file that may be a recipe."""
BAR = 40
"""Characters of the longest bar of a histogram."""

app = typer.Typer(no_args_is_help=False, pretty_exceptions_enable=False, help="Check and show training data.")

Target = Annotated[
    str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a file, a folder or a data set on the hub.")
]
TokenizerOf = Annotated[
    str | None,
    typer.Option("--tokenizer", help="A model whose tokenizer to use. Default: the recipe's student."),
]
Length = Annotated[
    int, typer.Option("--max-length", min=2, help="Maximum tokens of a sample, unless a recipe gives it.")
]
Bad = Annotated[
    str,
    typer.Option(
        "--on-bad-record", help="What to do with a bad record: error or skip, unless a recipe gives it."
    ),
]


@dataclass(frozen=True)
class Wanted:
    """What to read and how: a recipe, or a file alone. tokenizer: whose, None where none is named."""

    recipe: Recipe | None
    path: str
    tokenizer: str | None
    revision: str | None = None
    max_length: int = 1024
    on_bad_record: str = "error"

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources as ``data`` reads them."""
        if self.recipe is None:
            return [{"path": self.path}]
        return [source.reading for source in self.recipe.data.sources]


@app.command("check", cls=OfRecipe)
def check(
    target: Target,
    tokenizer: TokenizerOf = None,
    allow_plugin: AllowPlugin = None,
    max_length: Length = 1024,
    on_bad_record: Bad = "error",
) -> None:
    """Count records, tokens, duplicates, languages and held-out overlap."""
    wanted = _wanted(target, tokenizer, max_length, on_bad_record)
    if wanted.tokenizer is None:
        for spec in wanted.sources:
            _check_records(spec, on_bad_record)
        say("give --tokenizer MODEL to count tokens and see what is trained on.")
        return
    from selectkd.data.inspect import check as look

    loaded = _tokenizer(wanted)
    sources, held = _read(wanted, loaded)
    for source in sources:
        found = look(source, held_out=held or ())
        overlap = (
            "no held-out text"
            if held is None
            else f"in held-out text too {found.overlap}, with its prompts {found.same_prompt}, with nearly its prompts "
            f"{found.near_prompt}"
        )
        say(source.summary)
        say(
            f"  examples {found.examples}, tokens {found.tokens}, trained on {found.trained_tokens}, "
            f"duplicates {found.duplicates}, nearly the prompt of another record {found.near_duplicates}"
        )
        say(f"  {overlap}")
        say(f"  {_languages(source, loaded)}")
        say(f"  tokens a sample: {found.shortest} to {found.longest}")
        _histogram(found.lengths)
        for problem in source.problems[:5]:
            say(f"  bad: {problem}")
        for warning in found.warnings:
            say(f"  warning: {warning}")
    if held is not None:
        say(f"held out: {len(held)} examples")


@app.command("show", cls=OfRecipe)
def show(
    target: Target,
    tokenizer: TokenizerOf = None,
    allow_plugin: AllowPlugin = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Samples to show from each source.")
    ] = 3,
    page: Annotated[
        Path | None,
        typer.Option("--page", metavar="FILE", help="Write the samples as HTML, with thumbnails of images."),
    ] = None,
    max_length: Length = 1024,
    on_bad_record: Bad = "error",
) -> None:
    """Print samples with the trained tokens marked.

    They are coloured on a terminal, and between [[ and ]] elsewhere. An image is a line between << and >>.
    """
    wanted = _wanted(target, tokenizer, max_length, on_bad_record)
    if page is not None and wanted.tokenizer is None:
        raise ConfigError(
            "--page shows what is trained on: give --tokenizer MODEL with it, or name a recipe."
        )
    if wanted.tokenizer is None:
        from selectkd.data.files import read_records

        for spec in wanted.sources:
            few = {**_reading(spec), "limit": min(samples, spec.get("limit") or samples)}
            records = read_records(on_bad_record=_policy(on_bad_record), **few)
            say(records.summary)
            for origin, record in records:
                say(f"--- {origin}\n{json.dumps(record, ensure_ascii=False, indent=2, default=str)}")
        say("give --tokenizer MODEL to see what is trained on.")
        return
    from selectkd.data.durable import write_plain
    from selectkd.data.inspect import pieces, thumbnails
    from selectkd.report.samples import Sample, Shown, samples_page

    loaded = _tokenizer(wanted)
    shown = []
    for source in _read(wanted, loaded, samples)[0]:
        say(source.summary)
        found = []
        for example in source.examples:
            parts, trained = pieces(example, loaded), sum(example.completion)
            say(f"--- {example.origin}: {len(example)} tokens, {trained} trained on")
            write(paint(parts))
            small = thumbnails(example) if page is not None else []
            found.append(Sample(example.origin, len(example), trained, parts, small))
        shown.append(Shown(source.summary, found))
    if page is not None:
        write_plain(page, samples_page(f"Samples of {target}", shown).encode("utf-8", "backslashreplace"))
        say(f"{page} shows them with their images")


@app.command("align", cls=OfRecipe)
def align(
    target: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe with teacher.cross_tokenizer.")],
    allow_plugin: AllowPlugin = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Samples to show from each source.")
    ] = 3,
    json_file: JsonFile = None,
) -> None:
    """Compare how student and teacher tokenize the same text.

    The output is Markdown, one line for each span of text.
    """
    from selectkd.config import ModelTeacher, load_recipe
    from selectkd.data.aligned_page import aligned, page
    from selectkd.data.crossing import cross
    from selectkd.models.load import load_tokenizer

    recipe = load_recipe(target)
    if not isinstance(recipe.teacher, ModelTeacher):
        raise ConfigError(
            f"{target}: `data align` needs teacher: {{model: ...}}, the model that has another tokenizer."
        )
    wanted = _of(recipe, None)
    student = _tokenizer(wanted)
    crossing = cross(student, load_tokenizer(recipe.teacher.model, revision=recipe.teacher.revision))
    sources, _ = _read(wanted, student, samples)
    texts = [aligned(example, crossing) for source in sources for example in source.examples]
    write_answer(json_file, [one.as_dict() for one in texts])
    say(page(texts, crossing).rstrip("\n"))


def _wanted(target: str, tokenizer: str | None, max_length: int, on_bad_record: str) -> Wanted:
    if not _is_recipe(target):
        return Wanted(None, target, tokenizer, None, max_length, _policy(on_bad_record))

    from selectkd.config import load_recipe

    return _of(load_recipe(target), tokenizer)


def _is_recipe(target: str) -> bool:
    """Whether a target is a recipe: a YAML file, or one of JSON with the keys of a recipe."""
    path = Path(target)
    if path.suffix.lower() != ".json" or not path.is_file() or path.stat().st_size > LARGEST:
        return path.suffix.lower() in (".yaml", ".yml")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"data", "training"} <= content.keys()


def _of(recipe: Recipe, tokenizer: str | None) -> Wanted:
    if tokenizer is not None:
        return Wanted(recipe, "", tokenizer)
    whose: Any = recipe.student if recipe.student.model else recipe.teacher
    return Wanted(recipe, "", getattr(whose, "model", None), getattr(whose, "revision", None))


def _policy(word: str) -> Any:
    if word not in ("error", "skip"):
        raise ConfigError(f"--on-bad-record {word!r} must be error or skip.")
    return word


def _tokenizer(wanted: Wanted) -> Any:
    from selectkd.models.load import load_tokenizer

    return load_tokenizer(str(wanted.tokenizer), revision=wanted.revision)


def _read(wanted: Wanted, tokenizer: Any, samples: int | None = None) -> tuple[list[Source], Examples | None]:
    """The sources, and what is held out, None where nothing is. samples: the first of each source alone, held out or
    not.
    """
    from selectkd.data.render import TextRules
    from selectkd.data.sources import dataset_source
    from selectkd.models.ends import end_ids
    from selectkd.models.load import load_vision
    from selectkd.training.recipe_text import read_text

    vision = load_vision(str(wanted.tokenizer), revision=wanted.revision)
    if wanted.recipe is None:
        ends = end_ids(str(wanted.tokenizer), tokenizer)
        spec = {"path": wanted.path, "limit": samples}
        rules = TextRules(wanted.max_length, on_bad_record=_policy(wanted.on_bad_record))
        return [dataset_source(spec, tokenizer, rules, eos_ids=ends, vision=vision)], None
    recipe = wanted.recipe
    if samples is not None:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"evaluation": None})})
    text = read_text(recipe, tokenizer, limit=samples, vision=vision)
    return text.sources, text.heldout if recipe.data.evaluation is not None else None


def _reading(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec[key] for key in READING if key in spec}


def _check_records(spec: Mapping[str, Any], on_bad_record: str) -> None:
    from selectkd.data.chunks import chunks
    from selectkd.data.files import Checked, check_reading, items_of
    from selectkd.data.formats import to_sample
    from selectkd.data.places import Place

    policy, reading = _policy(on_bad_record), _reading(spec)
    check_reading(reading.get("format"), reading.get("limit"), policy)
    place = Place(**{name: reading[name] for name in reading if name not in ("format", "limit", "storage_options")},
                  options=reading.get("storage_options", {}))  # fmt: skip
    records = Checked(
        items_of(chunks(place)),
        format=reading.get("format"),
        limit=reading.get("limit"),
        on_bad_record=policy,
    )
    seen: set[bytes] = set()
    sizes: Counter[int] = Counter()
    for origin, record in records:
        try:
            to_sample(record, records.found.format, origin=origin)
        except DataError as problem:  # what cannot be trained on
            records.refuse(problem)
            records.found.good, records.found.bad = records.found.good - 1, records.found.bad + 1
            continue
        text = json.dumps(record, sort_keys=True, default=str)
        seen.add(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest())
        sizes[len(text)] += 1
    say(records.found.summary(place.path, given=records.named is not None))
    say(f"  records {records.found.good}, duplicates {records.found.good - len(seen)}")
    say(f"  characters a record: {min(sizes)} to {max(sizes)}")
    bounds: Counter[int] = Counter()
    for size, count in sizes.items():
        bounds[1 << max(0, size - 1).bit_length()] += count
    _histogram(bounds)
    for problem in records.found.problems[:5]:
        say(f"  bad: {problem}")


def _languages(source: Source, tokenizer: Any) -> str:
    from selectkd.data.inspect import languages

    try:
        found = languages(source.examples, tokenizer)
    except ConfigError as error:
        return str(error)
    count = sum(found.values())
    shares = ", ".join(f"{name} {100 * number / count:.1f}%" for name, number in list(found.items())[:6])
    return f"languages of {count:,} samples: {shares}"


def _histogram(lengths: Mapping[int, int]) -> None:
    for line in _bars(lengths):
        say(line)


def _bars(lengths: Mapping[int, int]) -> Iterator[str]:
    most = max(lengths.values(), default=0)
    for bound, count in sorted(lengths.items()):
        yield f"  <= {bound:>8,} {clean('#' * max(1, round(BAR * count / most)))} {count}"
