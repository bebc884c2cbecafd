"""Recipes with any value, override or mutation: each is valid or refused, none crashes."""

from __future__ import annotations

import random
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from config.test_recipes import SMALL
from selectkd.config import Recipe, load_recipe, recipe_from
from selectkd.errors import ConfigError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
KEYS = [
    "teacher",
    "teacher.model",
    "student",
    "student.from_teacher",
    "student.from_teacher.choose",
    "data",
    "data.sources",
    "data.evaluation",
    "objective",
    "objective.beta",
    "objective.verifier",
    "objective.always_accept",
    "training",
    "training.lora",
    "training.max_steps",
    "training.early_stopping",
]


@settings(max_examples=300, derandomize=True, deadline=None)
@given(key=st.sampled_from(KEYS), value=VALUES)
def test_a_recipe_with_any_value_anywhere_is_valid_or_refused(key: str, value: object) -> None:
    values: dict = {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"sources": [{"path": "x"}]},
        "objective": {},
        "training": {"output_dir": "r", "epochs": 1, "batch_size": 1},
    }
    here = values
    *above, last = key.split(".")
    for step in above:
        here = here.setdefault(step, {})
    here[last] = value
    try:
        assert isinstance(recipe_from(values), Recipe)
    except ConfigError as error:
        assert len(str(error).splitlines()) <= 6


@settings(max_examples=300, derandomize=True, deadline=None)
@given(key=st.sampled_from(KEYS) | st.text(max_size=20), value=st.text(max_size=20))
def test_any_override_is_valid_or_refused(key: str, value: str) -> None:
    values = {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"sources": [{"path": "x"}]},
        "training": {"output_dir": "r", "epochs": 1, "batch_size": 1},
    }
    try:
        recipe_from(values, [f"{key}={value}"])
    except ConfigError:
        return


def test_a_mutated_file_is_valid_or_refused(tmp_path: Path) -> None:
    draw, file = random.Random(0), tmp_path / "recipe.yaml"
    alphabet = "{}[]:,-&*!|>'\"%@`#?\t\n \\0aé\x00"
    for _ in range(300):
        text = list(SMALL)
        for _ in range(draw.randint(1, 4)):
            text[draw.randrange(len(text))] = draw.choice(alphabet)
        file.write_bytes("".join(text).encode())
        try:
            load_recipe(file)
        except ConfigError:
            continue
