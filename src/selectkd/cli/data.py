"""``selectkd data check``, ``show`` and ``align``: what would be trained on, before anything is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.terminal import clean, paint, say, write
from selectkd.errors import ConfigError

if TYPE_CHECKING:
    from selectkd.config import Recipe
    from selectkd.data import Source

BAR = 40
"""Characters of the longest bar of a histogram."""

app = typer.Typer(
    no_args_is_help=False, pretty_exceptions_enable=False, help="Look at data before training on it."
)

Target = Annotated[
    str, typer.Argument(metavar="RECIPE|FILE", help="A recipe, or a file, folder or hub data set id.")
]
TokenizerOf = Annotated[
    str | None,
    typer.Option("--tokenizer", help="A model whose tokenizer is used; a recipe's own is its student's."),
]
Length = Annotated[
    int, typer.Option("--max-length", min=2, help="Tokens kept of a sample; a recipe has its own.")
]
Bad = Annotated[str, typer.Option("--on-bad-record", help="error or skip; a recipe has its own.")]


@dataclass(frozen=True)
class Wanted:
    """What to read and how to render it, from a recipe or from flags."""

    sources: list[dict[str, Any]]
    held_out: dict[str, Any] | None
    tokenizer: str | None
    rendering: dict[str, Any]
    revision: str | None = None


@app.command("check")
def check(
    target: Target,
    tokenizer: TokenizerOf = None,
    max_length: Length = 1024,
    on_bad_record: Bad = "error",
) -> None:
    """Count records, duplicates, overlap with held-out text and lengths."""
    wanted = _wanted(target, tokenizer, max_length, on_bad_record)
    if wanted.tokenizer is None:
        for spec in wanted.sources:
            _check_records(spec, on_bad_record)
        say("give --tokenizer MODEL to count tokens and see what is trained on.")
        return
    from selectkd.data import check as look

    loaded = _tokenizer(wanted)
    held = _source(wanted.held_out, loaded, wanted, 0) if wanted.held_out is not None else None
    for index, spec in enumerate(wanted.sources):
        source = _source(spec, loaded, wanted, index)
        found = look(source, held_out=held if held is not None else ())
        say(source.told)
        say(
            f"  examples {found.examples}, tokens {found.tokens}, trained on {found.trained_tokens}, "
            f"duplicates {found.duplicates}, overlap with held-out text {found.overlap}"
        )
        say(f"  tokens a sample: {found.shortest} to {found.longest}")
        _histogram(found.lengths)
        for problem in source.problems[:5]:
            say(f"  bad: {problem}")
        for warning in found.warnings:
            say(f"  warning: {warning}")
    if held is not None:
        say(f"held out: {held.told}")


@app.command("show")
def show(
    target: Target,
    tokenizer: TokenizerOf = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="How many samples of each source.")
    ] = 3,
    max_length: Length = 1024,
    on_bad_record: Bad = "error",
) -> None:
    """Print samples; what is trained on stands in colour, or between [[ and ]] where there is none."""
    wanted = _wanted(target, tokenizer, max_length, on_bad_record)
    few = [{**spec, "limit": min(samples, spec.get("limit") or samples)} for spec in wanted.sources]
    if wanted.tokenizer is None:
        from selectkd.data import read_records

        for spec in few:
            records = read_records(on_bad_record=_policy(on_bad_record), **_read(spec))
            say(records.told)
            for origin, record in records:
                say(f"--- {origin}\n{json.dumps(record, ensure_ascii=False, indent=2, default=str)}")
        say("give --tokenizer MODEL to see what is trained on.")
        return
    from selectkd.data import pieces

    loaded = _tokenizer(wanted)
    for index, spec in enumerate(few):
        source = _source(spec, loaded, wanted, index)
        say(source.told)
        for example in source.examples:
            say(f"--- {example.origin}: {len(example)} tokens, {sum(example.completion)} trained on")
            write(paint(pieces(example, loaded)))


@app.command("align")
def align(
    target: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe with teacher.cross_tokenizer.")],
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="How many samples of each source.")
    ] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show how student and teacher cut the same text, span by span, as Markdown."""
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
    few = [{**spec, "limit": min(samples, spec.get("limit") or samples)} for spec in wanted.sources]
    sources = [_source(spec, student, wanted, index) for index, spec in enumerate(few)]
    told = [aligned(example, crossing) for source in sources for example in source.examples]
    say(
        json.dumps([one.as_dict() for one in told], ensure_ascii=False)
        if as_json
        else page(told, crossing).rstrip("\n")
    )


def _wanted(target: str, tokenizer: str | None, max_length: int, on_bad_record: str) -> Wanted:
    if not target.lower().endswith((".yaml", ".yml")):
        rendering = {"max_length": max_length, "on_bad_record": _policy(on_bad_record)}
        return Wanted([{"path": target}], None, tokenizer, rendering)

    from selectkd.config import load_recipe

    return _of(load_recipe(target), tokenizer)


def _of(recipe: Recipe, tokenizer: str | None) -> Wanted:
    evaluation = recipe.data.evaluation
    named = tokenizer or recipe.student.model
    return Wanted(
        sources=[source.reading for source in recipe.data.sources],
        held_out=None if evaluation is None or isinstance(evaluation, int | float) else evaluation.reading,
        tokenizer=named or getattr(recipe.teacher, "model", None),
        revision=None
        if tokenizer
        else recipe.student.revision
        if named
        else getattr(recipe.teacher, "revision", None),
        rendering={
            "max_length": recipe.training.max_length,
            "max_prompt_length": recipe.training.max_prompt_length,
            "on_too_long": recipe.data.on_too_long,
            "on_bad_record": recipe.data.on_bad_record,
            "train_on": recipe.data.train_on,
        },
    )


def _policy(word: str) -> Any:
    if word not in ("error", "skip"):
        raise ConfigError(f"--on-bad-record {word!r} must be error or skip.")
    return word


def _tokenizer(wanted: Wanted) -> Any:
    from selectkd.models.load import load_tokenizer

    return load_tokenizer(str(wanted.tokenizer), revision=wanted.revision)


def _source(spec: Mapping[str, Any], tokenizer: Any, wanted: Wanted, stream: int) -> Source:
    from selectkd.data import dataset_source

    return dataset_source(spec, tokenizer, stream=stream, **wanted.rendering)


def _read(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {key: spec[key] for key in ("path", "split", "config", "format", "limit") if key in spec}


def _check_records(spec: Mapping[str, Any], on_bad_record: str) -> None:
    from selectkd.data import read_records, to_sample

    records = read_records(on_bad_record=_policy(on_bad_record), **_read(spec))
    say(records.told)
    seen: Counter[str] = Counter()
    sizes: list[int] = []
    for origin, record in records:
        to_sample(record, records.format, origin=origin)  # refuses what cannot be trained on
        text = json.dumps(record, sort_keys=True, default=str)
        seen[text] += 1
        sizes.append(len(text))
    say(f"  records {len(records)}, duplicates {sum(seen.values()) - len(seen)}")
    say(f"  characters a record: {min(sizes)} to {max(sizes)}")
    _histogram(Counter(1 << max(0, size - 1).bit_length() for size in sizes))
    for problem in records.skipped[:5]:
        say(f"  bad: {problem}")


def _histogram(lengths: Mapping[int, int]) -> None:
    for line in _bars(lengths):
        say(line)


def _bars(lengths: Mapping[int, int]) -> Iterator[str]:
    most = max(lengths.values(), default=0)
    for bound, count in sorted(lengths.items()):
        yield f"  <= {bound:>8,} {clean('#' * max(1, round(BAR * count / most)))} {count}"
