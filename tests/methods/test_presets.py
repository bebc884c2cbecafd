"""Every method of the table runs, plain and with a selection; what a recipe says itself counts more."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selectkd.cli.app import main
from selectkd.config.expand import parts_of
from selectkd.config.methods import METHODS
from selectkd.errors import ConfigError
from selectkd.training.run import train

SELECTION = {"verifier": "greedy_topk", "k": 5, "beta": 0.01}


def options_of(name: str) -> list[Any]:
    return [name, *({"name": name, option: True} for option in METHODS[name].options)]


@pytest.mark.parametrize(
    ("method", "verifier"),
    [("selectkd-paper", "greedy_topk"), ({"name": "selectkd-paper", "spec_k": True}, "spec_k")],
)
def test_the_papers_own_method_has_the_papers_numbers(
    method: Any, verifier: str, recipe: Callable[..., Any]
) -> None:
    objective = recipe(method=method).objective
    assert objective.divergence == {"name": "forward_kl"}
    assert objective.verifier == {"name": verifier, "k": 5} and objective.beta == 0.01


@pytest.mark.parametrize("selection", [None, SELECTION], ids=["plain", "selected"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_plain_and_with_a_selection(
    method: str, selection: Any, recipe: Callable[..., Any], pair: Path
) -> None:
    reference = {"model": str(pair / "student")}
    made = recipe(method=method, reference=reference, **({"selection": selection} if selection else {}))
    result = train(made)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2 and result.skipped == 0
    assert all(math.isfinite(line["loss"]) and line["tokens"] > 0 for line in steps)
    assert result.before is not None and result.after is not None and result.before.kl != result.after.kl
    if selection:
        assert made.objective.verifier == {"name": "greedy_topk", "k": 5} and made.objective.beta == 0.01
        assert all(line["tar"] < 1.0 for line in steps)


STORED = {"name": "distillm2", "stored": True}
"""Needs a file of both halves: tests/generation/test_store.py has one."""
OPTIONS = [one for name in METHODS for one in options_of(name)[1:] if one != STORED]


@pytest.mark.parametrize("method", OPTIONS, ids=str)
def test_every_option_of_a_method_runs(method: Any, recipe: Callable[..., Any]) -> None:
    result = train(recipe(method=method, training={"max_steps": 1}))
    assert result.steps == 1 and result.skipped == 0


def test_the_parts_of_a_method_are_a_recipe_that_gives_the_same_run(recipe: Callable[..., Any]) -> None:
    short = recipe(method="abkd")
    parts = parts_of("abkd")
    assert recipe(**parts).objective == short.objective
    assert recipe(
        method="abkd", objective={"divergence": {"name": "alpha_beta", "alpha": 0.5}}
    ).objective.divergence == {
        "name": "alpha_beta",
        "alpha": 0.5,
        "beta": 0.7,
    }


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"method": "distilm2"}, "Did you mean 'distillm2'"),
        ({"method": {"name": "gkd", "onpolicy": True}}, "Did you mean 'on_policy'"),
        ({"method": {"name": "gkd", "on_policy": 3}}, "true or false"),
        ({"method": "adaspec"}, "needs reference"),
        ({"method": "kd", "selection": SELECTION, "objective": {"beta": 0.5}}, "leave out one of the two"),
        ({"method": "gkd", "data": {"packing": True}}, "packing needs the length"),
        (
            {"objective": {"language_model": 1.0}, "data": {"policy": "student"}},
            "text by the data set or the teacher",
        ),
        (
            {"method": "minillm", "data": {"policy": {"name": "teacher_mixed", "share": 0.5}}},
            "corrects for text drawn",
        ),
        ({"method": "minillm", "data": {"policy": {"temperature": 0.7}}}, "models' own distributions"),
        ({"objective": {"selector": "adaspec", "verifier": "greedy_topk"}}, "compares with a reference"),
        ({"objective": {"by_writer": {"student": {"beta": 0.0}}}}, "names a writer that no policy uses"),
    ],
)
def test_what_a_method_cannot_do_is_said_in_words(said: Any, told: str, recipe: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=told):
        train(recipe(**said))


def test_every_number_of_a_preset_says_where_it_is_from_and_the_docs_say_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["show", "methods", "--json", "-"]) == 0
    rows = []
    for method in json.loads(capsys.readouterr().out):
        for one in method["defaults"]:
            if isinstance(one["value"], bool | int | float) or one["key"] == "objective.reduction":
                source = METHODS[method["name"]].cites[one["key"]]
                assert source == one["source"]
                rows.append(f"| {method['name']} | `{one['key']}` | {json.dumps(one['value'])} | {source} |")
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text("utf-8")
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == rows
