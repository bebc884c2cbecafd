"""Every name on the page from the paper to the code is one of the package, under its whole path."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from selectkd.config import Recipe
from selectkd.objective.verifiers import VERIFIERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper_map.md").read_text(encoding="utf-8")
NAMES = [
    name.partition("(")[0]
    for name in dict.fromkeys(re.findall(r"`([^`]+)`", PAGE))
    if not name.startswith(("selectkd ", "test_"))  # test_named and test_readme know them
]
KEYS = re.findall(r'"([a-z_]+)"', str(Recipe.model_json_schema()).replace("'", '"'))


def is_there(name: str) -> bool:
    """A file of the project or of the package, a verifier, a word of a recipe, or what a module of the package has."""
    if "/" in name or name.endswith(".py"):
        return (ROOT / name).exists() or (ROOT / "src" / "selectkd" / name).exists()
    if "." not in name:
        return name in VERIFIERS or name.partition(":")[0] in KEYS
    module, _, what = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(f"selectkd.{module}"), what)
    except ModuleNotFoundError:
        return False


def test_the_page_names_more_than_forty_things() -> None:
    assert len(NAMES) > 40


@pytest.mark.parametrize("name", NAMES)
def test_every_name_of_the_page_is_there(name: str) -> None:
    assert is_there(name), name
