"""docs/results.md is what the studies' rows give."""

from __future__ import annotations

from pathlib import Path

import pytest

from selectkd.cli import main

ROOT = Path(__file__).parents[2]


def test_the_page_of_results_is_made_from_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "figures").mkdir()
    studies = sorted(str(path) for path in Path("studies").glob("*.yaml"))
    page, figures = tmp_path / "results.md", tmp_path / "figures"
    words = ["study", "results", *studies, "--allow-plugin", "lab_noise", "--markdown", str(page)]
    assert main([*words, "--figures", str(figures)]) == 0
    assert page.read_text("utf-8") == Path("docs/results.md").read_text("utf-8"), "make results"
    drawn = {path.name for path in figures.iterdir()}
    assert drawn == {path.name for path in Path("docs/figures").glob("study-*.svg")}
