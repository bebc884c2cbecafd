"""``selectkd study compare RECIPE...``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.answer import STDOUT, JsonFile, write_answer
from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, show_progress
from selectkd.errors import ConfigError

if TYPE_CHECKING:
    from selectkd.evals.studies.compare import Paired, Plan


def compare(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="One or several recipes.")],
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Methods as NAME or NAME+OPTION, separated by commas. Default: the recipes unchanged.",
        ),
    ] = "",
    seeds: Annotated[
        int,
        typer.Option(
            "--seeds", min=1, help="The number of seeds for each method, counted from the recipe's own."
        ),
    ] = 1,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Add two controls: random tokens at the same rate, and the gate's verdicts on the control's own "
            "student, dealt out among like places.",
        ),
    ] = False,
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
    runs: Annotated[
        Path | None,
        typer.Option("--runs", help="The folder for run folders. Default: the recipe's output_dir."),
    ] = None,
    keep_students: Annotated[
        bool, typer.Option("--keep-students", help="Keep the weights of the students.")
    ] = False,
    device: Device = "auto",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print how many runs there are and how long they may take.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Compare methods on one budget, with and without selection.

    Each finished run adds its results to the JSON file. Repeating the command runs what is missing or failed.
    """
    from selectkd.config import load_recipe, recipe_from
    from selectkd.config.load import values_of
    from selectkd.evals.studies.arms import arms as arms_of
    from selectkd.evals.studies.compare import compare as run
    from selectkd.evals.studies.compare import differences, plan
    from selectkd.models.devices import device_of

    device_of(device)
    file = None if json_file == STDOUT else json_file
    values: dict[str, Mapping[str, Any]] = {}
    for path in recipes:
        load_recipe(path, changes or [])  # every problem of the recipe itself, with its lines
        if path.stem in values:
            raise ConfigError(f"two recipes are called {path.stem}; give them different names.")
        values[path.stem] = values_of(path, changes or [])
    words = [word.strip() for word in methods.split(",") if word.strip()]
    found = arms_of(values, words, seeds=seeds, controls=controls)
    for arm in found:
        if recipe_from(arm.values).data.evaluation is None:
            raise ConfigError(
                "a comparison needs held-out text; set data.evaluation to {path: ...} or a share."
            )
    ahead = plan(found, file)
    _planned(ahead)
    if dry_run:
        if file is None:  # a file holds the rows that are done
            write_answer(json_file, {**asdict(ahead), "left": ahead.left})
        return
    folder = runs if runs is not None else Path(next(iter(values.values()))["training"]["output_dir"])

    def show(number: int, row: dict[str, Any]) -> None:
        what = row.get("error") or f"KL {row['held_out_kl']:.4f}  TAR {row['tar']:.3f}"
        show_progress(f"{number + 1}/{len(found)} {_called(row)}: {what}")

    rows = run(found, file, folder, keep=keep_students, on_row=show, device=device)
    if file is None:
        write_answer(json_file, rows)
    _table(rows)
    _paired(differences(rows))


def _planned(plan: Plan) -> None:
    about = "" if plan.seconds is None else f", about {plan.seconds / 60:.0f} min"
    say(f"{plan.runs} runs, {plan.done} done, {plan.left} to go{about}")


def _table(rows: Sequence[Mapping[str, Any]]) -> None:
    good = [row for row in rows if not row.get("error")]
    head = f"{'method':<22}{'selection':<16}{'runs':>5}{'KL':>9}{'loss':>8}{'TAR':>7}{'bite':>7}"
    say(f"{head}{'tokens/s':>10}{'peak MB':>9}")
    for key in dict.fromkeys((row["recipe"], row["method"], row["selection"]) for row in good):
        of_arm = [row for row in good if (row["recipe"], row["method"], row["selection"]) == key]

        def mean(name: str, of_arm: list[Mapping[str, Any]] = of_arm) -> float:
            seen = [row[name] for row in of_arm if row[name] is not None]
            return sum(seen) / len(seen) if seen else float("nan")

        name = " ".join(part for part in key[:2] if part)
        say(
            f"{name:<22}{key[2]:<16}{len(of_arm):>5}{mean('held_out_kl'):>9.4f}{mean('held_out_loss'):>8.3f}"
            f"{mean('tar'):>7.3f}{mean('bite'):>7.3f}{mean('tokens_per_second'):>10.1f}"
            f"{mean('peak_bytes') / 2**20:>9.0f}"
        )
    failed = [row for row in rows if row.get("error")]
    for row in failed:
        say(f"failed: {_called(row)}: {row['error']}")


def _called(row: Mapping[str, Any]) -> str:
    return f"{row['recipe']} {row['method']} {row['selection']} seed {row['seed']}".strip()


def _paired(found: Sequence[Paired]) -> None:
    if not found:
        return
    say(
        "\nheld-out KL, second minus first, with 95% intervals: over seeds (Student's t), over held-out sequences "
        "(bootstrap); in brackets each seed's own"
    )
    for pair in found:
        one, other = (" ".join(arm) for arm in (pair.first, pair.second))
        runs, apart = pair.over_seeds, pair.difference
        seeds = ", ".join(f"{value:+.4f}" for value in pair.by_seed)
        say(
            f"{one} -> {other}: {apart.value:+.4f}, seeds [{runs.low:+.4f}, {runs.high:+.4f}], "
            f"sequences [{apart.low:+.4f}, {apart.high:+.4f}] ({seeds})"
        )
