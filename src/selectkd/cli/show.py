"""``selectkd show``: the tables of components, read from the components themselves."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.terminal import say
from selectkd.errors import ConfigError
from selectkd.objective.registry import did_you_mean, parameters

SINGULAR = {"policies": "policy", "label_losses": "label_loss"}
"""Kinds whose singular is not the word without its s."""
PAGES = ("teachers", "commands")
"""Kinds that no recipe names; each has a page of its own."""


def show(
    kind: Annotated[
        str | None,
        typer.Argument(
            help="divergences, label_losses, verifiers, selectors, extras, policies, methods, teachers, commands, "
            "or a name."
        ),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One component, to show in full.")] = None,
    json_file: JsonFile = None,
    markdown: Annotated[
        bool,
        typer.Option(
            "--markdown", help="Of teachers or commands: print the page docs/teachers.md or docs/cli.md."
        ),
    ] = False,
) -> None:
    """List the components a recipe can name, with their parameters.

    `selectkd show teachers` lists what each kind of teacher data supports.
    """
    if markdown and kind not in PAGES:
        raise ConfigError("--markdown prints one page: that of `show teachers` or that of `show commands`.")
    if kind == "commands":
        _commands(json_file, markdown)
        return
    if kind == "teachers":
        _teachers(name, json_file, markdown)
        return
    if kind in ("method", "methods"):
        _methods(name, json_file)
        return
    chosen = _chosen(catalogue(), kind, name)
    write_answer(
        json_file,
        {
            title: [{key: row[key] for key in ("name", "parameters", "doc")} for row in rows]
            for title, rows in chosen.items()
        },
    )
    if sum(map(len, chosen.values())) == 1:
        for row in (row for rows in chosen.values() for row in rows):
            say(f"{row['name']}({_spelled(row['parameters'])})\n\n{row['full_doc']}")
        return
    for title, rows in chosen.items():
        say(title)
        for row in rows:
            say(f"  {row['name']}({_spelled(row['parameters'])})\n      {row['doc']}")


def _commands(json_file: Path | None, markdown: bool) -> None:
    """Every command of the command line, or the page about them."""
    from selectkd.cli.reference import page, rows

    write_answer(json_file, {"commands": rows()})
    if markdown:
        say(page())
    else:
        for row in rows():
            say(f"{row['name']}\n      {row['doc']}")


def _teachers(name: str | None, json_file: Path | None, markdown: bool) -> None:
    """Divergence, verifier or selector x payload: exact, a bound or refused."""
    from selectkd.teachers.exactness import PAYLOADS, page, table

    rows = table()
    known = dict.fromkeys(row["name"] for row in rows)
    if name is not None and name not in known:
        raise ConfigError(f"no component is called {name!r}.{did_you_mean(name, known)}")
    rows = [row for row in rows if name in (None, row["name"])]
    write_answer(json_file, {"payloads": PAYLOADS, "teachers": rows})
    if markdown:
        say(page().rstrip("\n"))
    else:
        for one in dict.fromkeys((row["kind"], row["name"]) for row in rows):
            of_one = [row for row in rows if (row["kind"], row["name"]) == one]
            say(f"{one[0]} {one[1]}: " + ", ".join(f"{row['payload']} {row['verdict']}" for row in of_one))
            for row in of_one:
                if row["payload"] in ("top_k", "sampled", "aligned"):
                    say(f"      {row['payload']}: {row['reason']}")


def _methods(name: str | None, json_file: Path | None) -> None:
    """Every method, or one with its parts as a recipe would have them, each number with its source."""
    from selectkd.config.methods import METHODS

    if name is not None and name not in METHODS:
        raise ConfigError(
            f"no method is called {name!r}.{did_you_mean(name, METHODS)} Known: {', '.join(METHODS)}."
        )
    rows = [_method_row(one) for one in METHODS if name in (None, one)]
    write_answer(json_file, rows if name is None else rows[0])
    if name is None:
        for row in rows:
            say(f"{row['name']}\n      {row['doc']}")
    else:
        _print_method(rows[0])


def _method_row(name: str) -> dict[str, Any]:
    """{name, doc, parts, defaults: [{key, value, source}], options: [{name, doc, parts}], needs, source}."""
    from selectkd.config.expand import parts_of
    from selectkd.config.methods import METHODS

    method = METHODS[name]
    parts = parts_of(name)
    leaves = _leaves(parts)
    return {
        "name": name,
        "doc": method.doc,
        "parts": parts,
        "defaults": [
            {"key": key, "value": value, "source": method.cites.get(key, method.source)}
            for key, value in leaves.items()
        ],
        "options": [
            {"name": option, "doc": extra.doc, "parts": _plainly(extra.parts)}
            for option, extra in method.options.items()
        ],
        "needs": list(method.needs),
        "source": method.source,
    }


def _print_method(row: dict[str, Any]) -> None:
    say(f"{row['name']}: {row['doc']}\nSource: {row['source']}\n")
    say(f"method: {row['name']}          # stands for these parts; what a recipe says itself counts more")
    for key, value in _leaves(row["parts"]).items():
        cited = next(one["source"] for one in row["defaults"] if one["key"] == key)
        say(f"  {key}: {json.dumps(value)}" + (f"   # {cited}" if cited != row["source"] else ""))
    for need in row["needs"]:
        say(f"  {need}: needed beside it")
    for option in row["options"]:
        say(f"\nmethod: {{name: {row['name']}, {option['name']}: true}}\n  {option['doc']}")
        for key, value in _leaves(option["parts"]).items():
            say(f"  {key}: {json.dumps(value)}")


def _leaves(parts: Any, above: str = "") -> dict[str, Any]:
    """Dotted key -> value of everything in nested mappings; a list of one mapping counts as that mapping."""
    if isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], Mapping):
        parts = parts[0]
    if not isinstance(parts, Mapping):
        return {above: parts}
    return {
        key: value
        for name, part in parts.items()
        for key, value in _leaves(part, f"{above}.{name}" if above else str(name)).items()
    }


def _plainly(parts: Any) -> Any:
    return {key: _plainly(part) for key, part in parts.items()} if isinstance(parts, Mapping) else parts


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Every component: {kind: [{name, parameters {name: default}, doc (first line), full_doc}]}."""
    from selectkd.config.methods import METHODS
    from selectkd.config.rollouts import KINDS
    from selectkd.loss.extras import EXTRAS
    from selectkd.objective.divergences import DIVERGENCES, LABEL_LOSSES
    from selectkd.objective.selectors import SELECTORS
    from selectkd.objective.verifiers import VERIFIERS

    tables: dict[str, Mapping[str, Callable[..., Any]]] = {
        "divergences": DIVERGENCES,
        "label_losses": LABEL_LOSSES,
        "verifiers": VERIFIERS,
        "selectors": SELECTORS,
        "extras": EXTRAS,
    }
    rows = {
        title: [_row(name, component) for name, component in table.items()] for title, table in tables.items()
    }
    rows["policies"] = [
        {
            "name": str(policy.model_fields["name"].annotation.__args__[0]),  # type: ignore[union-attr]
            "parameters": {key: f.default for key, f in policy.model_fields.items() if key != "name"},
            "doc": _first(inspect.getdoc(policy) or ""),
            "full_doc": inspect.getdoc(policy) or "",
        }
        for policy in KINDS
    ]
    rows["methods"] = [
        {
            "name": name,
            "parameters": _leaves(_plainly(method.parts)),
            "doc": method.doc,
            "full_doc": f"{method.doc}\nSource: {method.source}",
        }
        for name, method in METHODS.items()
    ]
    return rows


def _row(name: str, component: Callable[..., Any]) -> dict[str, Any]:
    doc = inspect.getdoc(component) or ""
    defaults = {key: None if p.default is p.empty else p.default for key, p in parameters(component).items()}
    return {
        "name": name,
        "parameters": defaults,
        "doc": _first(doc),
        "full_doc": doc.partition("\n>>>")[0].rstrip(),
    }


def _first(doc: str) -> str:
    """The first line of a docstring, with the lines after it until a sentence ends."""
    taken: list[str] = []
    for line in doc.partition("\n\n")[0].splitlines():
        taken.append(line.strip())
        if line.rstrip().endswith("."):
            break
    return " ".join(taken)


def _chosen(
    rows: dict[str, list[dict[str, Any]]], kind: str | None, name: str | None
) -> dict[str, list[dict[str, Any]]]:
    if kind is None:
        return rows
    title = next((one for one in rows if kind in (one, one[:-1], SINGULAR.get(one))), None)
    if title is None and name is None:
        found = {one: [row for row in table if row["name"] == kind] for one, table in rows.items()}
        found = {one: table for one, table in found.items() if table}
        if found:
            return found
        every = [*rows, *(row["name"] for table in rows.values() for row in table)]
        raise ConfigError(
            f"there is no {kind!r} to show.{did_you_mean(kind, every)} Kinds: {', '.join([*rows, *PAGES])}."
        )
    if title is None:
        raise ConfigError(
            f"there is no kind {kind!r}.{did_you_mean(str(kind), rows)} Kinds: {', '.join([*rows, *PAGES])}."
        )
    if name is None:
        return {title: rows[title]}
    table = [row for row in rows[title] if row["name"] == name]
    if not table:
        known = [row["name"] for row in rows[title]]
        raise ConfigError(
            f"no {title[:-1]} is called {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}."
        )
    return {title: table}


def _spelled(given: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in given.items())
