"""``selectkd show``: the tables of components, read from the components themselves."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from selectkd.cli.terminal import say
from selectkd.errors import ConfigError
from selectkd.registry import did_you_mean, parameters


def show(
    kind: Annotated[
        str | None,
        typer.Argument(help="divergences, verifiers, selectors, methods, teachers, or the name of one."),
    ] = None,
    name: Annotated[str | None, typer.Argument(help="One component, told in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print docs/teachers.md.")] = False,
) -> None:
    """What a recipe can name, with parameters and defaults; of teachers, what each payload is worth."""
    if markdown and kind != "teachers":
        raise ConfigError("--markdown prints one page: write `selectkd show teachers --markdown`.")
    if kind == "teachers":
        _teachers(name, as_json, markdown)
        return
    chosen = _chosen(catalogue(), kind, name)
    if as_json:
        shown = {
            title: [{key: row[key] for key in ("name", "parameters", "doc")} for row in rows]
            for title, rows in chosen.items()
        }
        say(json.dumps(shown, indent=2, default=str))
        return
    if sum(map(len, chosen.values())) == 1:
        for row in (row for rows in chosen.values() for row in rows):
            say(f"{row['name']}({_spelled(row['parameters'])})\n\n{row['told']}")
        return
    for title, rows in chosen.items():
        say(title)
        for row in rows:
            say(f"  {row['name']}({_spelled(row['parameters'])})\n      {row['doc']}")


def _teachers(name: str | None, as_json: bool, markdown: bool) -> None:
    """Divergence, verifier or selector x payload: exact, a bound or refused."""
    from selectkd.teachers.exactness import PAYLOADS, page, table

    rows = table()
    known = dict.fromkeys(row["name"] for row in rows)
    if name is not None and name not in known:
        raise ConfigError(f"no component is called {name!r}.{did_you_mean(name, known)}")
    rows = [row for row in rows if name in (None, row["name"])]
    if as_json:
        say(json.dumps({"payloads": PAYLOADS, "teachers": rows}, indent=2))
    elif markdown:
        say(page().rstrip("\n"))
    else:
        for one in dict.fromkeys((row["kind"], row["name"]) for row in rows):
            mine = [row for row in rows if (row["kind"], row["name"]) == one]
            say(f"{one[0]} {one[1]}: " + ", ".join(f"{row['payload']} {row['verdict']}" for row in mine))
            for row in mine:
                if row["payload"] in ("top_k", "sampled", "aligned"):
                    say(f"      {row['payload']}: {row['reason']}")


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Every component: {kind: [{name, parameters {name: default}, doc (first line), told (all of it)}]}."""
    from selectkd.config.methods import METHODS
    from selectkd.divergences import DIVERGENCES
    from selectkd.selectors import SELECTORS
    from selectkd.verifiers import VERIFIERS

    tables: dict[str, Mapping[str, Callable[..., Any]]] = {
        "divergences": DIVERGENCES,
        "verifiers": VERIFIERS,
        "selectors": SELECTORS,
    }
    rows = {
        title: [_row(name, component) for name, component in table.items()] for title, table in tables.items()
    }
    rows["methods"] = [
        {
            "name": name,
            "parameters": dict(method.objective),
            "doc": method.doc,
            "told": f"{method.doc}\n{method.source}",
        }
        for name, method in METHODS.items()
    ]
    return rows


def _row(name: str, component: Callable[..., Any]) -> dict[str, Any]:
    told = inspect.getdoc(component) or ""
    defaults = {key: None if p.default is p.empty else p.default for key, p in parameters(component).items()}
    return {
        "name": name,
        "parameters": defaults,
        "doc": _first(told),
        "told": told.partition("\n>>>")[0].rstrip(),
    }


def _first(told: str) -> str:
    """The first line of a docstring, with the lines after it until a sentence ends."""
    taken: list[str] = []
    for line in told.partition("\n\n")[0].splitlines():
        taken.append(line.strip())
        if line.rstrip().endswith("."):
            break
    return " ".join(taken)


def _chosen(
    rows: dict[str, list[dict[str, Any]]], kind: str | None, name: str | None
) -> dict[str, list[dict[str, Any]]]:
    if kind is None:
        return rows
    title = next((one for one in rows if kind in (one, one[:-1])), None)
    if title is None and name is None:
        found = {one: [row for row in table if row["name"] == kind] for one, table in rows.items()}
        found = {one: table for one, table in found.items() if table}
        if found:
            return found
        every = [*rows, *(row["name"] for table in rows.values() for row in table)]
        raise ConfigError(
            f"there is no {kind!r} to show.{did_you_mean(kind, every)} Kinds: {', '.join([*rows, 'teachers'])}."
        )
    if title is None:
        raise ConfigError(
            f"there is no kind {kind!r}.{did_you_mean(str(kind), rows)} Kinds: {', '.join([*rows, 'teachers'])}."
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
