"""Every command, path, name and recipe block of README and docs is one of today's."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from selectkd.cli.app import WrongUsage, app
from selectkd.config import Recipe
from selectkd.config.load import recipe_from

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "selectkd"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
WHOLE = {
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "data": {"sources": [{"path": "text.jsonl"}]},
    "training": {"max_steps": 1, "batch_size": 1, "lora": {}, "output_dir": "run"},
}
PLACEHOLDERS = ("VERB", "distils")
"""Words behind `selectkd` that are none of its verbs."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def names_of_others(page: Path) -> set[str]:
    """On a page about another tool its options, which fill the first column of the page's tables."""
    if page.parent.name != "coming_from":
        return set()
    cells = re.findall(r"^\| (.*?) \|", page.read_text(encoding="utf-8"), re.M)
    found = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
    return {*found, *(word for name in found for word in re.findall(r"[\w.-]+", name))}


@cache
def program() -> Any:
    return typer.main.get_command(app)


def spans(page: Path) -> list[str]:
    """What a page says in code: its inline spans and the lines of its blocks, without comments."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    if page.stem == "troubleshooting":  # its messages are a test of their own
        text = re.sub(r"^(### .*|\| `.*)$", "", text, flags=re.M)
    blocks = re.findall(r"^ {4}(?![-*] )(\S.*)$", text, re.M)
    inline = re.findall(r"`([^`]+)`", re.sub(r"^ {4}.*$", "", text, flags=re.M))
    found = [re.sub(r"\s+#.*$", "", " ".join(one.split())) for one in [*blocks, *inline]]
    others = names_of_others(page)
    return [one for one in found if one not in others]


COMMAND = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:(?:accelerate|torchrun) .*-m )?(?=selectkd |make |python benchmarks/)(.*)"
)


def commands(page: Path) -> list[list[str]]:
    """The commands of a page, from the program's name on; what may be left out, as in [--real], is in them."""
    found = [COMMAND.fullmatch(one) for one in spans(page)]
    return [shlex.split(re.sub(r"[][]|\.\.\.", "", one[1])) for one in found if one]


class Parsed(Exception):
    """The arguments were understood; the program need not run."""


def parse_selectkd(words: list[str]) -> None:
    command = program()
    while hasattr(command, "commands") and words:
        name = words.pop(0)
        if name.startswith("-"):
            assert name in {option for one in command.params for option in one.opts} | {"--help"}, name
            return
        assert name in command.commands, f"{name} is no verb: {', '.join(command.commands)}"
        command = command.commands[name]
    try:
        command.make_context(command.name, words)
    except WrongUsage as error:
        assert type(error).__name__ == "MissingParameter", error  # a page may name a verb by itself


def parse_make(words: list[str]) -> None:
    for word in words:
        name, given, _ = word.partition("=")
        assert re.search(rf"^{name}\b *[?:]?=" if given else rf"^{name}:", MAKEFILE, re.M), word


def parse_benchmark(path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if path.stem == "verb":
        return parse_selectkd(words)
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, *given: Any, **named: Any) -> None:
        parse(self, *given, **named)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    with pytest.raises(Parsed):
        module.main()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_of_a_page_parses(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = []
    for program, *others in commands(page):
        try:
            if {*others[:2]} & {*PLACEHOLDERS}:
                continue
            if program == "selectkd":
                parse_selectkd(list(others))
            elif program == "make":
                parse_make(others)
            elif program == "python":
                parse_benchmark(ROOT / others[0], others[1:], monkeypatch)
        except (Exception, SystemExit) as error:
            wrong.append(f"{program} {' '.join(others)}: {error!r}"[:300])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_yaml_is_a_recipe_or_a_part_of_one(page: Path) -> None:
    for block in re.findall(r"^```ya?ml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        recipe_from({**WHOLE, **yaml.safe_load(block)})


@cache
def words() -> dict[Path, set[str]]:
    """The words of each file of src, those of its place among them; old names of keys, which are refused, apart."""
    files = [file for file in PACKAGE.rglob("*.py") if file.name != "migration.py"]
    return {
        file: {
            *re.findall(r"\w+", file.read_text(encoding="utf-8")),
            *file.relative_to(PACKAGE).with_suffix("").parts,
        }
        for file in files
    }


@cache
def keys() -> set[str]:
    """What a recipe may say anywhere: the schema's keys, and the parameters of what it names."""
    schema = Recipe.model_json_schema()
    sections = [schema, *schema["$defs"].values()]
    from selectkd.cli.show import catalogue
    from selectkd.config.methods import METHODS

    parameters = {key for rows in catalogue().values() for row in rows for key in row["parameters"]}
    options = {option for method in METHODS.values() for option in method.options}
    return {"name", *parameters, *options}.union(*(one.get("properties", ()) for one in sections))


@cache
def flags() -> set[str]:
    """Every flag of every verb."""

    def of(command: Any) -> Iterator[str]:
        yield from (option for one in command.params for option in (*one.opts, *one.secondary_opts))
        for inner in getattr(command, "commands", {}).values():
            yield from of(inner)

    return {*of(program()), "--help"}


OTHERS = {
    "--enable-scale-out",
    "--max-logprobs",
    "venv",
    "cuda",
    "pyproject",
    "my_pkg",
    "DistributedConfig",
    "lint",
    "compute_kd_loss",
}
"""Names of other people's programs, and of examples."""


def there(name: str) -> bool:
    """Whether a file is of this path, or one file of src has all parts of this dotted name (NAME stands for any)."""
    name = name.rstrip("/")
    if any((place / name).exists() for place in (ROOT, PACKAGE)) or any(PACKAGE.rglob(name)):
        return True
    parts = {part for part in re.findall(r"\w+", name) if not part.isupper()}
    return any(parts <= found for found in words().values())


def yaml_keys(span: str) -> set[str] | None:
    """The keys of a span that is a part of a recipe, else None."""
    if not re.match(r"\{?[a-z_.]+: ?\S", span):
        return None
    found = yaml.safe_load(re.sub(r"\.\.\.|\|", "x", span))
    inner = lambda one: set(one).union(*map(inner, one.values())) if isinstance(one, dict) else set()  # noqa: E731
    return {part for key in inner(found) for part in key.split(".")}


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.stem not in ("log", "cross_tokenizer")],
    ids=name_of,
)
def test_every_path_name_key_and_flag_of_a_page_is_there(page: Path) -> None:
    """But of the log, which is dated, and of a table of tokens."""
    wrong = []
    for span in spans(page):
        if COMMAND.fullmatch(span) or span.startswith("test_"):  # of tests test_readme knows
            continue
        of_recipe = yaml_keys(span)
        if of_recipe:
            wrong += [f"{span}: key {key}" for key in of_recipe - keys()]
        elif re.fullmatch(r"-{2}[a-z-]+( \S+)?", span):
            wrong += [span for one in span.split()[:1] if one not in flags() | OTHERS]
        elif re.fullmatch(r"[A-Za-z_][\w./-]*(\(.*\))?", span):
            name = span.partition("(")[0]
            wrong += [span] if not there(name) and not set(re.findall(r"\w+", name)) & OTHERS else []
    assert not wrong, "\n".join(wrong)
