"""``selectkd study compare|panel|dynamics|landscape|speculate``: the verbs of research."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from selectkd.cli import compare, dynamics, landscape, panel, speculate
from selectkd.cli.overrides import OfRecipe
from selectkd.cli.verb import Verb

VERBS: dict[str, tuple[type[Verb], Callable[..., Any]]] = {
    "compare": (OfRecipe, compare.compare),
    "panel": (OfRecipe, panel.panel),
    "dynamics": (Verb, dynamics.dynamics),
    "landscape": (Verb, landscape.landscape),
    "speculate": (Verb, speculate.speculate),
}

app = typer.Typer(pretty_exceptions_enable=False, help="Research: compare methods and analyse runs.")
for _name, (_class, _function) in VERBS.items():
    app.command(_name, cls=_class)(_function)
