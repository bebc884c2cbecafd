"""The page of every command, docs/cli.md, from the commands themselves."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import typer

from selectkd import errors

INTRODUCTION = """\
# Every command

Written by `selectkd show commands --markdown` from the commands themselves; a test holds the two equal.
`selectkd VERB --help` prints the same for one command.

A command that reads a recipe takes `KEY=VALUE` for `--set KEY=VALUE`.
With `--json -` standard output holds the answer alone; everything else goes to standard error.
"""
EVERYWHERE = ("debug", "quiet", "help")
"""Options of every command, which have a table of their own."""

KINDS = {"int": "N", "float": "NUMBER", "Path": "PATH", "path": "PATH"}
"""A kind of value by typer's name for it -> how the page writes it."""


def commands() -> Iterator[tuple[str, Any]]:
    """(name, command) of every command and group that `selectkd --help` leads to, in its order."""
    from selectkd.cli.app import app

    yield from _inside(typer.main.get_command(app), "selectkd")


def page() -> str:
    """docs/cli.md: exit codes, the options of every command, then each command with its arguments and options."""
    found = list(commands())
    shared = next(one for _, one in found if not _is_group(one)).params
    parts = [INTRODUCTION, _exit_codes(), "## Options of every command\n"]
    parts.append(_table([one for one in shared if one.name in EVERYWHERE]))
    for name, command in found:
        level = "##" if name.count(" ") == 1 else "###"
        needed = [_spelled(one) for one in command.params if one.param_type_name == "argument"]
        parts.append(f"{level} `{' '.join([name, *needed])}`\n")
        parts.append(_paragraphs(command.help or "") + "\n")
        others = [one for one in command.params if one.name not in EVERYWHERE]
        if others and not _is_group(command):
            parts.append(_table(others))
    return "\n".join(parts).strip()


def rows() -> list[dict[str, str]]:
    """{name, doc} of every command, without the groups."""
    return [
        {"name": name.partition(" ")[2], "doc": _paragraphs(command.help or "").partition("\n")[0]}
        for name, command in commands()
        if not _is_group(command)
    ]


def _inside(group: Any, above: str) -> Iterator[tuple[str, Any]]:
    for word in group.list_commands(None):
        inner = group.commands[word]
        if not inner.hidden:
            yield f"{above} {word}", inner
            if _is_group(inner):
                yield from _inside(inner, f"{above} {word}")


def _is_group(command: Any) -> bool:
    return hasattr(command, "commands")


def _exit_codes() -> str:
    """The table of exit codes, from the errors."""
    lines = ["## Exit codes\n", "| code | meaning |", "|---|---|", "| 0 | The command did what it should. |"]
    lines.append(
        "| 1 | A defect of selectkd, or a demo whose student did not learn. Please report the former. |"
    )
    for one in vars(errors).values():
        if not (inspect.isclass(one) and issubclass(one, errors.SelectKDError)):
            continue
        if "exit_code" in vars(one) and one is not errors.SelectKDError:
            meaning = (one.__doc__ or "").partition("\n")[0].partition(": exit code")[0]
            lines.append(f"| {one.exit_code} | {meaning.rstrip('.')}. |")
    return "\n".join(lines) + "\n"


def _table(parameters: list[Any]) -> str:
    lines = ["| argument or option | default | meaning |", "|---|---|---|"]
    for one in parameters:
        argument = one.param_type_name == "argument"
        name = _spelled(one) if argument else ", ".join([*reversed(one.opts), *one.secondary_opts])
        value = "" if argument or getattr(one, "is_flag", False) else f" {_value(one)}"
        cells = (f"`{name}{value}`", _default(one), " ".join((one.help or "").split()))
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _spelled(argument: Any) -> str:
    """RECIPE; [RECIPE] where it may be left out; RECIPE... where there may be several."""
    name = (argument.metavar or argument.name or "").strip("{}[].").upper()
    name += "..." if argument.nargs == -1 else ""
    return name if argument.required else f"[{name}]"


def _value(option: Any) -> str:
    """The metavariable that the help prints, else the kind of value."""
    return option.metavar or KINDS.get(str(option.bare_type()), "TEXT")


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    value = parameter.default
    if callable(value) or value is None or value is False or value in ("", (), []):
        return ""
    return f"`{parameter.opts[0] if value is True else value}`"


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(each.split()) for each in inspect.cleandoc(text).split("\n\n"))
