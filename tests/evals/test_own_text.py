"""``selectkd eval RUN`` without a word more: the run's student and teacher on the text that the run held out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from selectkd.cli import main
from selectkd.evals.runs import read_manifest


def test_eval_of_a_run_says_its_own_numbers_again(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["eval", str(tiny_run), "--json", "found.json"]) == 0
    found = json.loads(Path("found.json").read_text())
    rows = {(row["model"], row["metric"]): row for row in found["rows"]}
    after = read_manifest(tiny_run)["after"]
    for metric in ("kl", "perplexity"):
        row = rows[str(tiny_run), metric]
        assert (
            row["value"] == pytest.approx(after[metric], rel=1e-4)
            and row["low"] <= row["value"] <= row["high"]
        )
    assert rows[f"teacher of {tiny_run}", "perplexity"]["value"] == pytest.approx(
        after["teacher_perplexity"], rel=1e-4
    )
    assert rows[str(tiny_run), "tar"]["n"] == after["sequences"]
    assert "own text" in capsys.readouterr().out


def test_students_are_compared_on_the_same_text(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = tiny_run.parent / "teacher"
    assert main(["eval", str(tiny_run), "--suite", "own", "--compare", str(teacher), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    (apart,) = found["comparisons"]
    assert apart["metric"] == "kl" and apart["difference"] < 0  # the teacher is nearer to itself
    values = {row["model"]: row["value"] for row in found["rows"] if row["metric"] == "kl"}
    assert values[str(teacher)] == pytest.approx(0.0, abs=1e-6)
    assert apart["difference"] == pytest.approx(values[str(teacher)] - values[str(tiny_run)])


def test_what_is_no_run_is_refused(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tiny_run.parent / "teacher"), "--suite", "own"]) == 2
    assert "no finished run" in capsys.readouterr().err
