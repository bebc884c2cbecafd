"""``selectkd train RECIPE``."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import WarningLines, progress_console, say, without_other_bars


def train(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file. `selectkd init` writes one.")],
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto resumes a run found in output_dir, never refuses one, PATH resumes from that checkpoint.",
        ),
    ] = "auto",
    allow_change: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="A key that may differ from the run being resumed. Repeatable."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Distil the teacher of a recipe into its student."""
    from selectkd.config import load_recipe

    checked = load_recipe(recipe, changes or [])

    from selectkd.report.page import NAME, write_report
    from selectkd.training.record.progress import TrainingProgress
    from selectkd.training.run import train as run

    without_other_bars()
    log = logging.getLogger("selectkd")
    log.addHandler(WarningLines(logging.WARNING))
    log.propagate = False
    with TrainingProgress(progress_console()) as progress:
        result = run(
            checked, progress=progress, resume=resume, allow_change=allow_change or [], device=device,
            report=write_report,
        )  # fmt: skip
    if result.resumed_from is not None:
        over = result.resumed_from == result.steps and result.run_dir.joinpath("manifest.json").is_file()
        say("the run had already finished" if over else f"resumed from step {result.resumed_from}")
    say(
        f"{result.steps} steps in {result.seconds:.0f} s"
        + (", stopped early" if result.stopped_early else "")
    )
    if result.skipped:
        say(f"skipped steps: {result.skipped}")
    if result.kept is not None:
        say(f"layers kept of the teacher: {', '.join(map(str, result.kept))}")
    for name, measured in (("before", result.before), ("after", result.after)):
        if measured is not None:
            say(
                f"{name:<7} held-out KL {measured.kl:.4f} nats  perplexity {measured.perplexity:.3f}"
                f"  TAR {measured.tar:.3f}  bite {measured.bite:.3f}"
            )
    say(f"run folder: {result.run_dir}")
    page = result.run_dir / NAME
    if page.is_file():
        say(f"report: {page}")
