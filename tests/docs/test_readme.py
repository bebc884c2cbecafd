"""The README's code runs, and the links of each page lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_the_code_of_the_readme_runs(code):
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert 0.0 <= float(names["tar"]) <= 1.0  # type: ignore[arg-type]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs write them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S), re.M)
    plain = [re.sub(r"[^\w\s-]", "", one.lower()).strip() for one in headings]
    return {*(one.replace(" ", "-") for one in plain), *(re.sub(r"[-\s]+", "-", one) for one in plain)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_and_test_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?[^)]*\)", text)
    links += re.findall(r"""(?:src|href)=["'](?!https?:)([^"'#]*)(?:#([^"']*))?["']""", text)
    links += re.findall(r"^\[[^]^]+\]: (?!https?:)([^#\s]*)(?:#(\S*))?", text, re.M)
    for target, anchor in links:
        there = page.parent / target if target else page
        assert there.exists(), target
        assert not anchor or there.suffix != ".md" or anchor in anchors(there), f"{target}#{anchor}"
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}" in tests, name
    for path in re.findall(r"`((?:tests|src|examples|recipes|benchmarks|docs|studies)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_a_sentence_of_the_readme_has_at_most_twenty_five_words():
    text = re.sub(r"```[\s\S]*?```|^(?: {4}|#|\||!\[).*$", ".", README, flags=re.M)
    text = re.sub(r"`[^`]*`", "CODE", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text))
    every = re.split(r"(?<=[.!?])\s+", text)
    assert len(every) > 25, "the README is cut into sentences"
    assert [one for one in every if len(one.split()) > 25] == []
