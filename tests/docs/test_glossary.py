"""Each key and metric that the glossary names is one, and its sentences are short."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from selectkd.config import Recipe
from selectkd.evals.dynamics import Line
from selectkd.objective.objective import Objective
from selectkd.objective.registry import parameters
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS
from selectkd.training.heldout.evaluation import Evaluation
from selectkd.training.ledger import Ledger

PAGE = (Path(__file__).parents[2] / "docs" / "glossary.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith("| ")
][1:]
SCHEMA = Recipe.model_json_schema()
OF_COMPONENTS = {name for made in {**VERIFIERS, **SELECTORS}.values() for name in parameters(made)}


def sections(node: Any) -> list[dict[str, Any]]:
    """The sections that a place of the schema may hold."""
    if "$ref" in node:
        node = SCHEMA["$defs"][node["$ref"].rsplit("/", 1)[1]]
    inner = [*node.get("anyOf", ()), *node.get("oneOf", ()), *node.get("allOf", ())]
    inner += [node["items"]] if "items" in node else []
    return [node, *(found for one in inner for found in sections(one))]


def is_key(path: str) -> bool:
    places = [SCHEMA]
    for name in path.split("."):
        found = [one["properties"][name] for one in places if name in one.get("properties", {})]
        if not found:  # the parameter of a component
            return any("name" in one.get("properties", ()) for one in places) and name in OF_COMPONENTS
        places = [inner for one in found for inner in sections(one)]
    return True


def test_every_key_and_metric_of_the_glossary_is_one() -> None:
    metrics = {
        *Ledger(Objective()).line(),
        *(one.name for kind in (Evaluation, Line) for one in fields(kind)),
    }
    assert len(ROWS) >= 20
    for term, _, keys, measured, _ in ROWS:
        for key in re.findall(r"`([^`]+)`", keys):
            assert is_key(key), f"{term}: {key} is no key of a recipe"
        for name in re.findall(r"`([^`]+)`", measured):
            assert name in metrics, f"{term}: {name} is no metric"


def test_each_term_has_one_or_two_short_sentences_and_a_place() -> None:
    assert [row[0].lower() for row in ROWS] == sorted(row[0].lower() for row in ROWS)
    for term, meaning, *places in ROWS:
        sentences = re.split(r"(?<=\.) (?=[A-Z])", meaning)
        assert len(sentences) <= 2 and all(len(one.split()) <= 25 for one in sentences), term
        assert any(places), f"{term} is found nowhere"
