"""``selectkd watch RUN`` and ``selectkd runs [FOLDER]``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.terminal import say
from selectkd.errors import ConfigError, abridged

MOST = 90
"""Characters of a verdict in the table; --json has all of it."""
FEWEST = 40
"""Columns of a terminal that a verdict needs beside the numbers."""


def watch(
    run: Annotated[Path, typer.Argument(help="A run folder, while it trains or afterwards.")],
    every: Annotated[float, typer.Option("--every", min=0.1, help="Seconds between two updates.")] = 2.0,
) -> None:
    """Follow a run: progress, time left, curves and text.

    In a pipe it prints a line for each step. It ends when the run does.
    """
    from rich.console import Console
    from rich.live import Live

    from selectkd.report.live import lines, screen, states

    console = Console()
    if not console.is_terminal:
        last = -1
        for one in states(run, every=every):
            for step, text in lines(one, last):
                say(text)
                last = max(last, step)
        say(f"{one.name}: {one.state} at step {one.last_step}")
        return
    with Live(console=console, auto_refresh=False) as live:
        for one in states(run, every=every):
            live.update(screen(one), refresh=True)


def runs(
    folder: Annotated[Path, typer.Argument(help="A folder with run folders in it.")] = Path("runs"),
    json_file: JsonFile = None,
) -> None:
    """List runs with their state and what they came to."""
    from selectkd.report.escapes import clean
    from selectkd.report.run_files import run_folders

    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder. Name one that has run folders in it.")
    found = [_row(one) for one in run_folders(folder)]
    write_answer(json_file, found)
    if not found:
        say(f"no run in {folder}")
        return
    width = max(len(clean(row["run"], keep="")) for row in found) + 2
    head = f"{'run':<{width}}{'state':<12}{'step':>9}{'KL before':>11}{'after':>8}{'TAR':>7}"
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else len(head) + MOST + 2
    beside = columns - len(head) - 2 >= FEWEST  # else below, on a line of its own
    room = min(columns - 2 - len(head) * beside, MOST)
    say(f"{head}  verdict" if beside else head)
    for row in found:
        of = "" if row["planned"] is None else f"/{row['planned']}"
        measures = [row["kl_before"], row["kl_after"], row["tar_after"]]
        kl, after, tar = ("-" if value is None else f"{value:.3f}" for value in measures)
        step = f"{row['step']}{of}"
        verdict = abridged(clean(row["verdict"][0], keep=""), max(room, FEWEST))
        line = f"{clean(row['run'], keep=''):<{width}}{row['state']:<12}{step:>9}{kl:>11}{after:>8}{tar:>7}"
        say(f"{line}  {verdict}" if beside else f"{line}\n  {verdict}")


def _row(folder: Path) -> dict[str, Any]:
    from selectkd.report.run_files import read_run
    from selectkd.report.verdict import sentences

    run = read_run(folder, with_looks=False)
    before, after = run.before or {}, run.after or {}
    return {
        "run": str(folder),
        "state": run.state,
        "step": run.last_step,
        "planned": run.planned,
        "kl_before": before.get("kl"),
        "kl_after": after.get("kl"),
        "tar_before": before.get("tar"),
        "tar_after": after.get("tar"),
        "seconds": run.seconds,
        "skipped": run.skipped,
        "verdict": sentences(run),
    }
