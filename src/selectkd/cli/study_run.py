"""``selectkd study run FILE`` and ``selectkd study results FILE...``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from selectkd.cli.options import Device
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, show_progress
from selectkd.errors import ConfigError

RowsFile = Annotated[
    Path | None,
    typer.Option("--rows", metavar="FILE", help="The file of rows. Default: FILE with the ending .jsonl."),
]


def run(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A study: a YAML file.")],
    rows: RowsFile = None,
    runs: Annotated[
        Path, typer.Option("--runs", help="The folder for run folders, which go once their row is written.")
    ] = Path("runs/studies"),
    workers: Annotated[int, typer.Option("--workers", min=1, help="Runs at the same time.")] = 1,
    allow_plugin: AllowPlugin = None,
    device: Device = "auto",
    background: Annotated[
        bool,
        typer.Option("--background", help="Go on without this terminal; the output goes to a .log file."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print how many runs there are and how long they may take.")
    ] = False,
) -> None:
    """Run a study: every variant and control, with every seed.

    Caches that its teachers name with their model are filled first. Each finished run adds a row to the file of rows.
    Repeating the command runs what is missing or failed.
    """
    from selectkd.cli.cache import filled
    from selectkd.config.study import load_study
    from selectkd.evals.studies.rows import read_rows
    from selectkd.evals.studies.study import planned, run_study

    study, path = load_study(file), _rows_of(file, rows)
    total, done, seconds = planned(study, read_rows(path))
    about = "" if seconds is None else f", about {seconds / 60 / workers:.0f} min"
    say(f"{total} runs, {done} done, {total - done} to go{about}")
    if dry_run:
        return
    if background:
        log = path.with_suffix(".log")
        path.parent.mkdir(parents=True, exist_ok=True)
        log.touch()  # it is there from the start, for whoever follows it
        words = [
            "study",
            "run",
            file,
            "--rows",
            path,
            "--runs",
            runs,
            "--workers",
            workers,
            "--device",
            device,
        ]
        words += [word for one in allow_plugin or () for word in ("--allow-plugin", one)]
        # a shell starts it and ends, so that nothing here has to wait for it
        started = subprocess.run(
            ["sh", "-c", '"$@" >> "$0" 2>&1 < /dev/null & echo $!', log, sys.executable, "-m", "selectkd",
             *map(str, words)],
            start_new_session=True, stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        say(f"process {started.stdout.strip()} goes on; {log} has its output, {path} its rows")
        return

    def show(row: dict[str, Any]) -> None:
        summary = row.get("error") or f"KL {row['held_out_kl']:.4f}  TAR {row['tar']:.3f}"
        rate = "" if row["learning_rate"] is None else f" at {row['learning_rate']:g}"
        show_progress(f"{row['arm']} seed {row['seed']}{rate}: {summary}")

    for folder, recipe in study.caches().items() if done < total else ():
        if not (Path(folder).expanduser() / "index.json").is_file():
            show_progress(f"fills {folder}")
            filled(recipe, device)
    run_study(study, path, runs / file.stem, workers=workers, device=device, on_row=show)
    say(f"{path} holds the rows; `selectkd study results {file}` prints the tables")


def results(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Studies, each a YAML file.")],
    rows: Annotated[
        Path | None, typer.Option("--rows", help="The folder of their rows. Default: beside each file.")
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option("--markdown", metavar="FILE", help="Write the page into this file.")
    ] = None,
    figures: Annotated[
        Path | None, typer.Option("--figures", help="A folder for one figure of each study, as .svg.")
    ] = None,
    allow_plugin: AllowPlugin = None,
) -> None:
    """Print the tables and verdicts of studies from their rows.

    Rows of recipes that the study file no longer has are left out.
    """
    from selectkd.config.study import load_study
    from selectkd.data.durable import write_plain
    from selectkd.evals.figures import check_figure, draw_study
    from selectkd.evals.studies.results import markdown as section
    from selectkd.evals.studies.rows import read_rows
    from selectkd.evals.studies.study import of_recipes

    parts = []
    for file in files:
        study = load_study(file)
        there = read_rows(_rows_of(file, None if rows is None else rows / f"{file.stem}.jsonl"))
        found = of_recipes(study, there)
        if len(found) < len(there):
            show_progress(
                f"{file}: {len(there) - len(found)} of {len(there)} rows are left out, which are of other arms, rates "
                "or recipes than the file has now; `selectkd study run` makes them anew"
            )
        figure = None
        if figures is not None and found:
            figure = figures / f"study-{file.stem}.svg"
            check_figure(figure)
            draw_study(study, found, figure)
        shown = None if figure is None or markdown is None else _beside(figure, markdown)
        plugins = "".join(f" --allow-plugin {one}" for one in allow_plugin or ())
        command = f"selectkd study run {file}{plugins}"
        parts.append(section(file.stem, study, found, command=command, figure=shown))
    text = HEAD + "\n".join(parts)
    if markdown is None:
        say(text)
    else:
        write_plain(markdown, text.encode())


HEAD = """# Results of the studies

Written by `selectkd study results` from the rows of each study. A study file states its expectation before its runs.

"""


def _rows_of(file: Path, rows: Path | None) -> Path:
    if rows is not None and rows.is_dir():
        raise ConfigError(f"--rows {rows} is a folder; name a file.")
    return file.with_suffix(".jsonl") if rows is None else rows


def _beside(figure: Path, page: Path) -> str:
    """The figure's path as the page names it."""
    import os

    return os.path.relpath(figure, page.parent)
