"""Each message that the page of troubleshooting quotes is one of the source, and every extra's refusal is there."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r"^### `(.*)`$", PAGE, re.M)
EXTRAS = dict(re.findall(r"^\| `(\w+)` \| `(.*)` \|$", PAGE, re.M))
WITHOUT_REFUSAL = {"dev", "docs"}
"""Extras that no user's command needs."""
PLACEHOLDER = "\0"


def texts(node: ast.AST) -> Iterator[str]:
    """Every text of a file, a placeholder where a value goes in; texts that stand beside each other are one."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(one.value) if isinstance(one, ast.Constant) else PLACEHOLDER for one in node.values)
    for inner in ast.iter_child_nodes(node):
        yield from texts(inner)


def messages() -> str:
    files = sorted((ROOT / "src" / "selectkd").rglob("*.py"))
    found = {" ".join(text.split()) for file in files for text in texts(ast.parse(file.read_text("utf-8")))}
    return "\n".join(sorted(found))


def missing(quoted: list[str]) -> list[str]:
    """The quotations whose constant pieces no message of the source has, in their order."""
    source, wrong = messages(), []
    for one in quoted:
        pieces = [re.escape(piece.strip()) for piece in one.split("...")]
        if not re.search("[^\n]*".join(pieces), source):
            wrong.append(one)
    return wrong


def test_every_message_of_the_page_is_one_of_the_source() -> None:
    assert len(QUOTED) >= 30 and len(set(QUOTED)) == len(QUOTED)
    assert missing([*QUOTED, *EXTRAS.values()]) == []
    assert missing(["a message that ... nobody writes"]) == ["a message that ... nobody writes"]


def test_every_message_has_enough_of_its_own_to_be_found_by() -> None:
    for one in QUOTED:
        assert max(len(re.findall(r"\w+", piece)) for piece in one.split("...")) >= 2, one


def test_the_refusal_of_each_extra_is_on_the_page() -> None:
    declared = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2]
    extras = set(re.findall(r"^(\w+) = \[", declared.partition("\n[")[0], re.M))
    assert set(EXTRAS) == extras - WITHOUT_REFUSAL
    installed = re.findall(r'how_to_install\([\'"](\w+)', "\n".join(
        file.read_text("utf-8") for file in (ROOT / "src" / "selectkd").rglob("*.py")
        if file.name != "extras.py"
    ))  # fmt: skip
    assert set(installed) <= set(EXTRAS)


def test_each_message_is_explained() -> None:
    parts = re.split(r"^#+ ", PAGE, flags=re.M)
    for part in parts:
        if part.startswith("`"):
            assert len(part.partition("\n")[2].split()) >= 8, part
