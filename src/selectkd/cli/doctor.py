"""``selectkd doctor RECIPE``: everything that can fail later, before an hour of a GPU is spent."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from selectkd.cli.device import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, without_other_bars
from selectkd.errors import ConfigError


def doctor(
    recipe: Annotated[str, typer.Argument(help="A recipe, a YAML file.")],
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
    device: Device = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print a list of {check, ok, message} as JSON.")
    ] = False,
) -> None:
    """Check recipe, text, models, memory and disk; ends with the exit code of the first thing a run would fail at."""
    from selectkd.config import load_recipe

    try:
        checked = load_recipe(recipe, changes or [])
    except ConfigError as error:
        _tell([{"check": "recipe", "ok": False, "message": str(error)}], as_json)
        raise typer.Exit(error.exit_code) from error

    from selectkd.models.devices import training_device
    from selectkd.training.preflight.doctor import Finding
    from selectkd.training.preflight.doctor import doctor as examine

    without_other_bars()
    try:
        on = training_device(device)
    except ConfigError as error:
        _tell([{"check": "device", "ok": False, "message": str(error)}], as_json)
        raise typer.Exit(error.exit_code) from error
    found: list[Finding] = []
    rows: list[dict[str, Any]] = [{"check": "recipe", "ok": True, "message": f"{recipe} is a recipe"}]
    if not as_json:
        _tell(rows, as_json)
    for finding in examine(checked, device=on):
        found.append(finding)
        rows.append(finding.as_dict())
        if not as_json:
            _tell(rows[-1:], as_json)
    if as_json:
        _tell(rows, as_json)
    raise typer.Exit(next((finding.exit_code for finding in found if not finding.ok), 0))


def _tell(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        say(json.dumps(rows))
        return
    for row in rows:
        say(f"{'ok    ' if row['ok'] else 'FAILS '} {row['check']:<12} {row['message']}")
