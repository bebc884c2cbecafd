"""``selectkd doctor RECIPE``: everything that can fail later, before an hour of a GPU is spent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, show_progress, without_other_bars
from selectkd.errors import ConfigError


def doctor(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Check a recipe, its data, models, memory and disk first.

    The exit code is that of the first problem a run would meet.
    """
    rows, exit_code = [], 0
    for check, ok, message, code in _findings(recipe, changes or [], device):
        say(f"{'ok    ' if ok else 'FAILS '} {check:<12} {message}")
        rows.append({"check": check, "ok": ok, "message": message})
        exit_code = exit_code or code
    write_answer(json_file, rows)
    raise typer.Exit(exit_code)


def _findings(recipe: str, changes: list[str], device: str) -> Iterator[tuple[str, bool, str, int]]:
    """(check, whether it holds, message, exit code) of each check, as it is done; torch loads for a sound recipe."""
    from selectkd.config import load_recipe

    try:
        checked = load_recipe(recipe, changes)
    except ConfigError as error:
        yield "recipe", False, str(error), error.exit_code
        return

    from selectkd.models.devices import training_device
    from selectkd.training.preflight.doctor import doctor as examine

    without_other_bars()
    try:
        on = training_device(device)
    except ConfigError as error:
        yield "device", False, str(error), error.exit_code
        return
    yield "recipe", True, f"{recipe} is a recipe", 0
    for finding in examine(checked, device=on, stage=lambda name, *_: show_progress(name)):
        yield finding.check, finding.ok, finding.message, finding.exit_code
