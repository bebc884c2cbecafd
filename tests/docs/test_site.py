"""The documentation builds as a site without a warning, and its pictures are those the package draws."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "reference" / "api" / "index.html").read_text("utf-8")
    assert "DistillTrainer" in page and "&gt;&gt;&gt;" in page, "the API's docstrings and examples are there"


def test_the_pictures_of_verifiers_are_those_the_package_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name, svg in import_module("pictures").pictures().items():
        assert (ROOT / "docs" / "figures" / f"verifier-{name}.svg").read_text("utf-8") == svg, (
            "python benchmarks/pictures.py"
        )
