"""What every verb has: ``--debug``, ``--quiet``, and standard output for the answer alone with ``--json -``."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from selectkd.cli.answer import answering

Debug = Annotated[
    bool, typer.Option("--debug", help="Show the full traceback of an error.", show_default=False)
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", help="Print no progress, only results, warnings and errors.", show_default=False),
]


def _of_every_verb(debug: Debug = False, quiet: Quiet = False) -> None:
    """Takes the options; ``main`` reads them before a verb is looked for."""


class Verb(TyperCommand):
    """A verb with the options of every verb."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        shared = typer.Typer(add_completion=False)
        shared.command()(_of_every_verb)
        for option in typer.main.get_command(shared).params:
            option.expose_value = False
            self.params.append(option)

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb, once its answer is known to have a place."""
        with answering(ctx.params.get("json_file")):
            return super().invoke(ctx)
