"""Names in the code say what a thing is: words that need a glossary of ours are no names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "selectkd"
VAGUE = {"told", "said", "made", "mine", "wish"}
FOREIGN = {"connection_made"}
"""Names that a library gives: asyncio calls the method of a protocol so."""
JUDGES = (
    "evals/judging/",
    "evals/suites.py",
    "evals/vision/judged.py",
    "evals/vision/run.py",
    "evals/vision/benchmarks.py",
    "cli/eval.py",
    "cli/eval_suites.py",
    "teachers/remote/settings.py",
)
"""Where a judge is: a language model that compares answers."""


def identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(name, line) of every variable, attribute, argument, keyword, function, class and import."""
    for node in ast.walk(tree):
        name = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "arg", None)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = node.name
        if isinstance(node, ast.alias):
            name = node.asname or node.name.rpartition(".")[2]
        if isinstance(name, str):
            yield name, getattr(node, "lineno", 0)


def named_with(words: set[str], code: str) -> list[tuple[str, int]]:
    """(name, line) of the identifiers that hold one of the words."""
    found = identifiers(ast.parse(code))
    return [
        (name, line) for name, line in found if words & set(name.lower().split("_")) and name not in FOREIGN
    ]


def test_a_word_is_found_wherever_a_name_may_stand() -> None:
    for code in (
        "told = 1",
        "x.said()",
        "def f(mine): ...",
        "f(made_by=1)",
        "class Wish: ...",
        "import a as told",
    ):
        assert named_with(VAGUE, code), code
    assert not named_with(VAGUE, "def connection_made(self): ...; 'told'")


def test_no_name_is_a_vague_word() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        assert named_with(VAGUE, file.read_text()) == [], file


def test_judge_names_a_language_model_alone() -> None:
    for file in sorted(PACKAGE.rglob("*.py")):
        if not file.relative_to(PACKAGE).as_posix().startswith(JUDGES):
            assert named_with({"judge", "judges", "judged"}, file.read_text()) == [], file
