"""`benchmarks/verb.py` runs a verb as the command line does and writes its figures to results.csv, by record.py."""

from __future__ import annotations

import csv
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def verb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    found = importlib.import_module("verb")
    monkeypatch.setattr(importlib.import_module("record"), "RESULTS", tmp_path / "results.csv")
    monkeypatch.chdir(tmp_path)
    return found


def written(tmp_path: Path) -> list[dict[str, str]]:
    header = (ROOT / "benchmarks" / "results.csv").read_text("utf-8").splitlines()[0].split(",")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        return [dict(zip(header, row, strict=True)) for row in csv.reader(file)]


def test_every_verb_leaves_the_figures_of_its_answer(verb: Any, tiny_run: Path, tmp_path: Path) -> None:
    text, teacher = str(tiny_run.parent / "text.jsonl"), str(tiny_run.parent / "teacher")
    run, answer = str(tiny_run), tmp_path / "answer.json"
    recipe = str(tiny_run.parent / "recipe.yaml")
    for command, expected in (
        (["eval", run, "--suite", "perplexity", "--data", text, "--limit", "3", "--compare", teacher],
         lambda seen: [(row["value"], f"{row['low']:.3g}..{row['high']:.3g}") for row in seen["rows"]]),
        (["speculate", "--draft", run, "--target", teacher, "--limit", "2", "--lengths", "2", "--tokens", "6",
          "--no-transformers", "--temperature", "0", "--prompts", text],
         lambda seen: [(seen["acceptance"], f"{seen['acceptance_low']:.3g}..{seen['acceptance_high']:.3g}")]),
        (["landscape", run, "--samples", "2", "--points", "3", "--kicks", "2", "--no-hessian"],
         lambda seen: [(row["loss"], "") for row in seen["students"]]),
        (["dynamics", run], lambda seen: [(seen["kappa"], f"{seen['kappa_low']:.3g}..{seen['kappa_high']:.3g}")]),
        (["panel", recipe], lambda seen: [(one["rate"], "") for one in seen["gates"].values()]),
    ):  # fmt: skip
        assert (
            verb.main([*(() if command[0] == "eval" else ("study",)), *command, "--json", str(answer)]) == 0
        )
        rows = [row for row in written(tmp_path) if row["benchmark"] == command[0]]
        assert all(row["case"] == " ".join(command[1:]) and row["commit"] and row["date"] for row in rows)
        for value, spread in expected(json.loads(answer.read_text())):
            assert any(row["value"] == f"{value:.5g}" and row["spread"] == spread for row in rows), (
                command[0],
                value,
            )


def test_rows_of_a_comparison_have_their_seeds_and_differences(verb: Any) -> None:
    def row(selection: str, seed: int, kl: float) -> dict[str, Any]:
        return {"recipe": "r", "method": "kd", "selection": selection, "seed": seed, "held_out_kl": kl, "tar": None,
                "held_out_loss": None, "bite": None, "per_sequence_kl": [kl, kl + 1]}  # fmt: skip

    rows = [row("plain", 1, 2.0), row("plain", 2, 3.0), {**row("plain", 3, 9.0), "error": "gone"}]
    assert verb.rows_of("c", verb.of_compare(rows)) == [("c", "r kd plain", "held_out_kl", 2.5, 1.0, 2)]


def test_a_verb_that_fails_leaves_no_row_and_its_code(verb: Any, tmp_path: Path) -> None:
    assert verb.main(["study", "dynamics", str(tmp_path)]) == 2
    assert not (tmp_path / "results.csv").exists()
    for wrong in (["train", "x"], [], ["study", "dynamics", "x", "--json", "-"]):
        with pytest.raises(SystemExit, match="Verbs: eval"):
            verb.main(wrong)
    assert verb.case_of(["m", "--json", "x", "--figure=y", "--suite", "math"]) == "m --suite math"
