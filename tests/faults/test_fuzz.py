"""A few thousand random recipes, answers and caches, by the command that ``make fuzz`` runs at length."""

from __future__ import annotations

from pathlib import Path

from faults.forked import run_forked
from faults.fuzz import WHOLE, Tally
from selectkd.config import Recipe, recipe_from


def test_random_recipes_and_bytes_end_in_an_error_that_says_what_is_wrong_or_in_what_is_right() -> None:
    fuzz = str(Path(__file__).with_name("fuzz.py"))
    ran = run_forked(fuzz, "--recipes", "900", "--bytes", "4000", "--seed", "1")
    *told, last = ran.stdout.splitlines()
    assert last == "recipes 900, tracebacks 0; bytes 4000, tracebacks 0, hangs 0", (
        ran.stdout + ran.stderr[-2000:]
    )
    assert "'valid'" in told[0] and "'rows'" in told[1] and "'rows'" in told[2], "nothing sound came through"


def test_what_is_changed_at_random_is_valid_unchanged_and_a_stray_error_is_counted() -> None:
    assert isinstance(recipe_from(WHOLE), Recipe)
    tally = Tally()
    tally.case(lambda: str(1 // 0))
    assert tally.tracebacks == 1 and "ZeroDivisionError" in tally.told
