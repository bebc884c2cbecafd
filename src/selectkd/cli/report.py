"""``selectkd report RUN...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.terminal import say


def report(
    runs: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Run folders, finished or not. Several are compared."),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="FILE", help="The page. Default: report.html in the first run."),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", metavar="FILE", help="A JSON file of eval or study, to be shown. Repeatable."
        ),
    ] = None,
) -> None:
    """Write a page that shows what one or more runs did.

    It has curves, every token of the probe by its verdict, texts and results, and names what was not measured.
    """
    from selectkd.report.page import write_report

    path = write_report(*runs, out=out, extra=results or [])
    say(f"report: {path}")
