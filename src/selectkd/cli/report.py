"""``selectkd report RUN...``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.terminal import say
from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError


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
    interactive: Annotated[
        bool | None,
        typer.Option(
            "--interactive/--plain",
            help="Charts that answer the pointer. Default: where the extra `report` is installed.",
            show_default=False,
        ),
    ] = None,
    heatmap_svg: Annotated[
        Path | None,
        typer.Option(
            "--heatmap-svg", metavar="FILE", help="Write one text of the first run as an SVG instead."
        ),
    ] = None,
    text: Annotated[
        int | None,
        typer.Option("--text", min=1, help="The text for --heatmap-svg. Default: the one that changed most."),
    ] = None,
) -> None:
    """Write a page that shows what one or more runs did.

    It has curves, every token of the probe by its verdict, texts and results, and names what was not measured.
    """
    if heatmap_svg is not None:
        from selectkd.data.durable import write_plain
        from selectkd.report.heatmap_svg import heatmap_svg as drawn
        from selectkd.report.run_files import read_run

        write_plain(heatmap_svg, drawn(read_run(runs[0]), text).encode())
        say(f"heat-map: {heatmap_svg}")
        return

    from selectkd.report.interactive import available
    from selectkd.report.page import write_report

    if interactive and not available():
        raise ConfigError(
            f"--interactive needs Altair. Install it: {how_to_install('report')}, or use --plain."
        )
    drawn_by_altair = available() if interactive is None else interactive
    path = write_report(*runs, out=out, extra=results or [], interactive=drawn_by_altair)
    say(f"report: {path}")
