"""Methods on one budget: rows, one a run, that stay in a file; and what the rows say of pairs of arms."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np

from selectkd.data.durable import write_whole
from selectkd.errors import ConfigError
from selectkd.evals.statistics import Difference, Interval, paired_bootstrap, t_interval
from selectkd.evals.studies.arms import PLAIN, POSITION, RANDOM, SELECTED, SHUFFLE, Arm, controlled
from selectkd.evals.studies.files import files_read, same_files
from selectkd.evals.studies.one_run import FIELDS, run_apart

NAMES = ("recipe", "method", "selection", "seed")
CONTROLS = (RANDOM, SHUFFLE, POSITION)


def compare(
    arms: Sequence[Arm],
    file: Path | None,
    folder: Path,
    *,
    keep: bool = False,
    device: str = "auto",
    on_row: Callable[[int, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """The row of every arm, in their order: {method, selection, seed, FIELDS..., more}.

    ``file`` holds the rows so far after every run; an arm whose row is in it already, of the same recipe, is not run
    again; one that failed, or whose models or text were made again, is. A run that fails leaves a row with its
    ``error`` and null for every number, and the others go on; so does a control whose selected arm failed. device:
    where every arm runs, as of ``use_device``. on_row hears (number, row).
    """
    known = {_key(row): row for row in read_rows(file)}
    rows: list[dict[str, Any]] = []
    for number, arm in enumerate(arms):
        row = known.get(arm.key)
        if not _stands(row, arm):
            started, read = time.perf_counter(), files_read(arm.values)
            row = (
                _named(arm)
                | dict.fromkeys(FIELDS)
                | _run(arm, rows, folder, keep, device)
                | {"asked": _recipe_line(arm), "files": read}
            )
            row["wall_seconds"] = round(time.perf_counter() - started, 3)
        rows.append(row)
        rest = [other for key, other in known.items() if key not in {_key(one) for one in rows}]
        write_rows(file, rows + rest)
        if on_row is not None:
            on_row(number, row)
    return rows


@dataclass(frozen=True)
class Plan:
    """How much of a comparison is there: its runs, those whose row stands in the file, and the seconds the rest may
    take at what the others took, each method by its own runs where it has some; None before the first run.
    """

    runs: int
    done: int
    seconds: float | None

    @property
    def left(self) -> int:
        return self.runs - self.done


def plan(arms: Sequence[Arm], file: Path | None) -> Plan:
    """What ``compare`` would run of the arms, without running it."""
    known = {_key(row): row for row in read_rows(file)}
    done = [arm for arm in arms if _stands(known.get(arm.key), arm)]
    took = {arm.key: float(known[arm.key].get("wall_seconds", 0.0)) for arm in done}
    expected = 0.0
    for arm in arms:
        if arm.key not in took:
            own = [seconds for key, seconds in took.items() if key[:2] == arm.key[:2]]
            near = own or list(took.values())
            expected += sum(near) / len(near) if near else 0.0
    return Plan(len(arms), len(done), expected if took or len(done) == len(arms) else None)


def _stands(row: Mapping[str, Any] | None, arm: Arm) -> TypeGuard[dict[str, Any]]:
    """Whether the row is of a run of this very arm that came to its end, with the files as they are."""
    return (
        row is not None
        and not row.get("error")
        and row.get("asked") == _recipe_line(arm)
        and same_files(row, arm.values)
    )


def _run(
    arm: Arm, rows: Sequence[Mapping[str, Any]], folder: Path, keep: bool, device: str
) -> dict[str, Any]:
    if arm.selection == RANDOM:
        key = (arm.recipe, arm.method, SELECTED, arm.seed)
        selected = next((row for row in rows if _key(row) == key), None)
        if selected is None or selected.get("error"):
            return {"error": "the selected run that this one controls for failed"}
        try:
            arm = controlled(arm, selected)
        except ConfigError as error:
            return {"error": str(error)}
    row = run_apart(arm.values, folder / arm.folder, keep=keep, device=device)
    wrong = {
        name: value for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)
    }
    if wrong:  # no number of such a run says anything, and JSON has no word for them
        return {
            "error": f"the run diverged: {', '.join(f'{name} is {value}' for name, value in wrong.items())}"
        }
    return row


def _named(arm: Arm) -> dict[str, Any]:
    return dict(zip(NAMES, arm.key, strict=True))


def _recipe_line(arm: Arm) -> str:
    """The arm's recipe as one line, by which a row is known to be of the same run."""
    return json.dumps(arm.values, sort_keys=True, default=str)


def _key(row: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return (row.get("recipe", ""), row["method"], row["selection"], row["seed"])


def read_rows(file: Path | None) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no such file; ConfigError for one that holds something else."""
    if file is None or not file.exists():
        return []
    try:
        rows = json.loads(file.read_text("utf-8"))
        return [row for row in rows if _key(row)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file} does not hold the rows of a comparison ({type(error).__name__}: {error}). Name another file."
        ) from None


def write_rows(file: Path | None, rows: Sequence[Mapping[str, Any]]) -> None:
    """All rows into the file at once: a reader sees the old ones or the new ones."""
    if file is None:
        return
    write_whole(file, (json.dumps(list(rows), indent=1, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class Paired:
    """Two arms on the same held-out sequences and seeds: second minus first, in nats of held-out KL a token, as a row's
    ``held_out_kl`` is.

    ``difference`` has its interval over the held-out sequences, each the mean over the seeds both have; ``by_seed`` is
    the difference of each seed, and ``over_seeds`` their mean with Student's t interval.
    """

    recipe: str
    first: tuple[str, str]
    second: tuple[str, str]
    difference: Difference
    by_seed: tuple[float, ...]
    over_seeds: Interval

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def differences(rows: Sequence[Mapping[str, Any]]) -> list[Paired]:
    """Each method's selected arm and controls against its plain arm, and each plain arm against the first method's."""
    good = [row for row in rows if not row.get("error")]
    found: list[Paired] = []
    for recipe in dict.fromkeys(row.get("recipe", "") for row in good):
        of_recipe = [row for row in good if row.get("recipe", "") == recipe]
        methods = list(dict.fromkeys(row["method"] for row in of_recipe))
        pairs = [((methods[0], PLAIN), (method, PLAIN)) for method in methods[1:]]
        pairs += [
            ((method, PLAIN), (method, selection))
            for method in methods
            for selection in (SELECTED, *CONTROLS)
        ]
        pairs += [((method, selection), (method, SELECTED)) for method in methods for selection in CONTROLS]
        found += [
            pair for one, other in pairs if (pair := _paired(recipe, of_recipe, one, other)) is not None
        ]
    return found


def _paired(
    recipe: str, rows: Sequence[Mapping[str, Any]], first: tuple[str, str], second: tuple[str, str]
) -> Paired | None:
    kl_of, tokens_of = ({}, {}), {}
    for row in rows:
        for arm, seen in zip((first, second), kl_of, strict=True):
            if (row["method"], row["selection"]) == arm:
                seen[row["seed"]] = np.asarray(row["held_out_kl_of"])
                tokens_of[row["seed"]] = np.asarray(row["held_out_tokens_of"])
    seeds = sorted(set(kl_of[0]) & set(kl_of[1]))
    if not seeds:
        return None
    one, other = (np.stack([arm[seed] for seed in seeds]) for arm in kl_of)  # [seeds, sequences]
    tokens = tokens_of[seeds[0]]  # [sequences], the same for every run of a recipe
    by_seed = tuple(float(value) for value in (other - one) @ tokens / tokens.sum())
    apart = paired_bootstrap(one.mean(0), other.mean(0), weights=tokens)
    return Paired(recipe, first, second, apart, by_seed, t_interval(by_seed))
