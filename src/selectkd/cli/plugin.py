"""``--allow-plugin``: one option of every verb that reads a recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from selectkd.objective.plugins import allow_plugin


def _allow(modules: list[str] | None) -> list[str] | None:
    """Allows them as the command line is read, before any recipe is."""
    allow_plugin(*(modules or ()))
    return modules


AllowPlugin = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-plugin",
        metavar="MODULE",
        callback=_allow,
        help="A module of yours that the recipe may load components from. Repeatable.",
    ),
]
