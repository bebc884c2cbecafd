"""``selectkd study run|results|compare|panel|dynamics|landscape|speculate``: the verbs of research."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from selectkd.cli import compare, dynamics, landscape, panel, speculate, study_run
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
app.command("run", cls=Verb)(study_run.run)
app.command("results", cls=Verb)(study_run.results)
for _name, (_class, _function) in VERBS.items():
    app.command(_name, cls=_class)(_function)
