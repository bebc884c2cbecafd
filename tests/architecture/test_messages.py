"""Error messages: short sentences."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "selectkd"
WORDS = 25
"""Of a sentence, a value that is shown counted as one word."""
RAISED = re.compile(r"(Error|Problem|refuse|raised|broken|stopped)$")
"""Functions and classes that are given a message for the user."""


def text_of(node: ast.expr) -> str:
    """The text of an expression, with VALUE for what is only known when it runs."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else "VALUE"
    if isinstance(node, ast.JoinedStr):
        return "".join(map(text_of, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return text_of(node.left) + text_of(node.right)
    if isinstance(node, ast.FormattedValue):
        inner = node.value
        parts = [text_of(one) for one in ast.walk(inner) if isinstance(one, ast.Constant | ast.JoinedStr)]
        longest = max((one for one in parts if " " in one), key=len, default="VALUE")
        return longest if isinstance(inner, ast.IfExp) else "VALUE"
    return "VALUE"


def messages() -> Iterator[tuple[str, str]]:
    """(where, text) of every literal that is handed to an error."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call) and RAISED.search(ast.unparse(node.func)):
                for given in node.args:
                    yield f"{file.relative_to(PACKAGE)}:{node.lineno}", text_of(given)


def sentences(text: str) -> list[str]:
    """``text`` cut behind full stops and at line ends."""
    return [one for one in re.split(r"(?<=[.!?])\s+|(?<=\.)(?=VALUE)|\n", text) if one]


def test_a_sentence_of_an_error_has_at_most_twenty_five_words() -> None:
    every = [(where, one) for where, text in messages() for one in sentences(text)]
    assert len(every) > 500, "the walk finds the messages"
    wrong = [f"{where}: {one!r}" for where, one in every if len(one.split()) > WORDS]
    assert not wrong, "\n".join(wrong)
