"""Every key of a recipe is described, and docs/recipe.md says what the schema does."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from selectkd.cli import main
from selectkd.config import Recipe
from selectkd.config.study import Claim, Study

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
SCHEMA = Recipe.model_json_schema()
LIMITS = {"ge", "gt", "le", "lt"}
"""What pydantic leaves in a schema of a limit that it has no word of JSON Schema for."""


def described() -> Iterator[tuple[str, str]]:
    study, claim = Study.model_json_schema(), Claim.model_json_schema()
    for name, section in [("Recipe", SCHEMA), *SCHEMA["$defs"].items(), ("Study", study), ("Claim", claim)]:
        yield name, section.get("description", "")
        for key, node in section["properties"].items():
            yield f"{name}.{key}", node.get("description", "")


def test_every_key_is_described_in_three_words_or_more() -> None:
    assert len(list(described())) > 190
    assert not [name for name, text in described() if len(text.split()) < 3]


def test_no_sentence_about_a_key_is_longer_than_25_words() -> None:
    for name, text in described():
        for sentence in re.split(r"(?<=[.;:?])\s", text):
            assert len(sentence.split()) <= 25, (name, sentence)


def test_the_page_of_keys_is_the_schemas(capsys) -> None:
    assert main(["schema", "--markdown"]) == 0
    assert PAGE.read_text("utf-8") == capsys.readouterr().out, "selectkd schema --markdown > docs/recipe.md"


def test_every_limit_of_a_number_is_one_that_an_editor_knows() -> None:
    def walk(node: object) -> None:
        if isinstance(node, dict):
            assert not LIMITS & set(node), node
            for each in node.values():
                walk(each)
        for each in node if isinstance(node, list) else []:
            walk(each)

    walk(SCHEMA)
