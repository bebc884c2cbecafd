"""The rows of a study: a file of JSON lines, one a finished run, written as the runs end."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selectkd.errors import ConfigError

Row = dict[str, Any]
Key = tuple[str, int, float | None]
"""arm, seed, learning rate."""


def key_of(row: Mapping[str, Any]) -> Key:
    """The run that a row is of."""
    return (row["arm"], row["seed"], row["learning_rate"])


def read_rows(file: Path) -> dict[Key, Row]:
    """The newest row of every run; ConfigError with the line of one that is none.

    A last line without its end was cut as its process was killed: it counts as not written.
    """
    found: dict[Key, Row] = {}
    if not file.exists():
        return found
    for number, line in enumerate(file.read_text("utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            row = json.loads(line)
            found[key_of(row)] = row
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(
                f"{file}:{number}: no row of a study ({type(error).__name__}: {error}). Name another file by --rows."
            ) from None
    return found


def append_row(file: Path, row: Row) -> None:
    """Adds a row, on the disk before this returns; the rest of a cut line before it is taken away."""
    file.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, allow_nan=False) + "\n"
    with file.open("ab+") as out:
        end = out.seek(0, os.SEEK_END)
        if end:
            out.seek(0)
            out.truncate(out.read().rfind(b"\n") + 1)
        out.write(line.encode())
        out.flush()
        os.fsync(out.fileno())


def number(row: Mapping[str, Any] | None, name: str) -> float | None:
    """A row's number, None where the run failed or has none of that name."""
    value = None if row is None or row.get("error") else row.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def rate_of_others(row: Mapping[str, Any], *, always_accept: bool) -> float:
    """The rate at which a random control accepts the tokens that ``always_accept`` does not: (A - s) / (1 - s), A the
    gated run's acceptance and s the share of tokens always accepted, so that the control's acceptance is A in the mean.

    always_accept: whether the recipe names such tokens. ConfigError where the row gives no rate, or none in [0, 1].

    >>> rate_of_others({"acceptance": 0.75, "always_accepted": 0.5}, always_accept=True)
    0.5
    """
    accepted, named = number(row, "acceptance"), number(row, "always_accepted")
    if accepted is None:
        raise ConfigError("the gated run that this one controls for failed")
    if accepted > 1.0:
        raise ConfigError(
            f"the gated run's mean weight is {accepted:g}, and no random tokens have a rate above 1. State above_one "
            "in the gate's traits, and its control is matched_shuffle"
        )
    if always_accept and named is None:
        raise ConfigError(
            "the gated run's row lacks always_accepted, the share of tokens that always_accept names. Take the row out "
            "of the file, and the run is made again"
        )
    if not named:
        return accepted
    return min(1.0, max(0.0, (accepted - named) / (1.0 - named))) if named < 1.0 else 1.0


def paired(
    rows: Mapping[Key, Row],
    chosen: Mapping[str, float | None],
    first: str,
    second: str,
    seeds: Sequence[int],
    measure: str,
) -> list[float]:
    """second minus first of every seed that both arms have, at the learning rate ``chosen`` for each."""  # fmt: skip
    found = []
    for seed in seeds:
        one, other = (
            number(rows.get((arm, seed, chosen.get(arm))), measure) if arm in chosen else None
            for arm in (first, second)
        )
        if one is not None and other is not None:
            found.append(other - one)
    return found
