"""Overrides: where they reach, which one wins, and what they take out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.test_recipes import SMALL, written
from selectkd.config import BetaChange, load_recipe
from selectkd.config.load import values_of
from selectkd.errors import ConfigError


def test_overrides_reach_sections_that_the_recipe_leaves_out(tmp_path: Path) -> None:
    changes = [
        "training.lora.r=4",
        "objective.verifier.k=7",
        "objective.divergence.name=skew_kl",
        "objective.divergence.alpha=0.2",
        "objective.beta.start=1.0",
        "objective.beta.end=0.01",
        "objective.beta.until_tar=0.5",
        "data.sources.0.limit=9",
        "data.evaluation.path=held.jsonl",
    ]
    recipe = load_recipe(written(tmp_path, SMALL), changes)
    assert recipe.training.lora is not None and recipe.training.lora.r == 4
    assert recipe.objective.verifier == {"name": "spec_k", "k": 7}
    assert recipe.objective.divergence == {"name": "skew_kl", "alpha": 0.2}
    assert isinstance(recipe.objective.beta, BetaChange) and recipe.objective.beta.until_tar == 0.5
    assert recipe.data.sources[0].limit == 9


def test_a_later_override_wins(tmp_path: Path) -> None:
    assert load_recipe(written(tmp_path, SMALL), ["training.seed=1", "training.seed=2"]).training.seed == 2


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        (["training.max_steps=7"], {"max_steps": 7, "epochs": None}),
        (["training.epochs=2", "training.max_steps=null"], {"max_steps": None, "epochs": 2}),
        (["training.max_steps=7", "training.max_steps=null"], {"max_steps": None, "epochs": 1}),
    ],
)
def test_an_override_stands_instead_of_the_key_that_excludes_it(
    changes: list[str], left: dict[str, Any], tmp_path: Path
) -> None:
    path = written(tmp_path, SMALL.replace("max_steps: 10", "epochs: 1"))
    training = load_recipe(path, changes).training
    assert {"max_steps": training.max_steps, "epochs": training.epochs} == left
    student = load_recipe(path, ["student.model=other"]).student
    assert student.model == "other" and student.from_teacher is None
    assert values_of(path, ["student.from_teacher.layers=2"])["student"]["model"] is None
    undone = ["student.from_teacher.layers=2", "student.from_teacher=null"]
    assert load_recipe(path, undone).student.model == "student"
    with pytest.raises(ConfigError, match="exactly one of max_steps and epochs"):
        load_recipe(path, ["training.max_steps=7", "training.epochs=2"])
