"""What an installation gets: pins that resolve on every supported Python, a wheel that is whole, advice that works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.10", "3.13")
"""The ends of the declared range."""


def plain_environment() -> dict[str, str]:
    """The environment without what a machine says of its own indexes: only the public one counts."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}


@pytest.mark.parametrize("python", PYTHONS)
def test_the_pins_resolve_on_the_public_index_alone(python: str, tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            sys.executable, "-m", "uv", "pip", "compile", str(ROOT / "pyproject.toml"), "--extra", "dev", "-q",
            "-c", str(ROOT / "constraints" / "pinned.txt"), "--python-version", python, "--no-config",
            "--python-platform", "x86_64-manylinux_2_28", "-o", str(tmp_path / "resolved.txt"),
        ],
        capture_output=True, text=True, check=False, env=plain_environment(), timeout=300,
    )  # fmt: skip
    if "Failed to fetch" in ran.stderr:
        pytest.skip("needs the package index")
    assert ran.returncode == 0, ran.stderr
    assert "\ntorch==2.13.0\n" in (tmp_path / "resolved.txt").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], check=True, cwd=ROOT,
        capture_output=True,
    )  # fmt: skip
    (built,) = folder.glob("*.whl")
    unpacked = folder / "site"
    with zipfile.ZipFile(built) as file:
        file.extractall(unpacked)
    return unpacked


def test_the_wheel_holds_every_recipe_and_starts_from_one(wheel: Path, tmp_path: Path) -> None:
    recipes = {file.name for file in (ROOT / "recipes").iterdir()}
    assert {file.name for file in (wheel / "selectkd" / "recipes").iterdir()} == recipes
    ran = subprocess.run(
        [sys.executable, "-m", "selectkd", "init", "r.yaml", "--from", "demo"], check=False, cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)}, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "r.yaml").read_text() == (ROOT / "recipes" / "demo.yaml").read_text()


def test_no_message_advises_a_package_that_no_index_has() -> None:
    for file in (ROOT / "src").rglob("*.py"):
        advice = re.findall(r"pip install[^`\n]*", file.read_text(encoding="utf-8"))
        assert not [one for one in advice if "selectkd" in one and file.name != "extras.py"], file


def test_how_to_install_names_the_requirements_of_an_extra() -> None:
    from selectkd.config.extras import how_to_install

    assert how_to_install("math") == "pip install 'math-verify>=0.8' 'reasoning-gym>=0.1.20'"
    assert "pyproject.toml" in how_to_install("no-such-extra")
