"""The pair of our own: made in small by its script, asked by a study what it sees, and shown with its images."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.cli import main
from selectkd.config.study import load_study
from selectkd.errors import ConfigError
from selectkd.evals.studies.one_run import measured
from selectkd.evals.studies.results import markdown
from selectkd.evals.vision import scenes, synthetic
from selectkd.models.load import load_vision
from vision.conftest import Recipes

ROOT = Path(__file__).parents[2]
TASKS = ("count", "place")
"""Two of five: most of the time goes into answers."""


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("vision_pair")


def test_a_small_pair_is_made_once_and_a_study_asks_its_student_what_it_sees(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "TASKS", {name: scenes.TASKS[name] for name in TASKS})
    command = ["--small", "--folder", str(tmp_path / "pair")]
    assert script.main(command) == 0
    looks = [json.loads(line) for line in (tmp_path / "pair/teacher/curve.jsonl").read_text().splitlines()]
    assert looks[-1]["heldout"] < looks[0]["heldout"]
    for name in ("teacher", "student-s1"):
        assert load_vision(tmp_path / "pair" / name) is not None
        assert set(TASKS) < json.loads((tmp_path / f"pair/{name}.json").read_text())["option_accuracy"].keys()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert script.main(command) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}

    study = yaml.safe_load((ROOT / "studies/vision_pair.yaml").read_text("utf-8"))
    study["recipe"]["training"] |= {"max_steps": 2, "batch_size": 4, "evaluate_every": None}
    study["measures"][0]["scenes"] = 2
    path = tmp_path / "study.yaml"
    path.write_text(
        yaml.safe_dump(study, sort_keys=False).replace(".cache/vision-pair", str(tmp_path / "pair")), "utf-8"
    )
    checked = load_study(path)
    values = checked.values("greedy", 1)
    values["data"]["cache"] = str(tmp_path / "text")
    row = measured(values, tmp_path / "run", measures=checked.asked())
    for metric in ("option_accuracy", "yes_no_accuracy"):
        for shown in ("", " (blank)", " (shuffled)"):
            of_tasks = [row[f"{metric} {task}{shown}"] for task in TASKS]
            assert row[f"{metric}{shown}"] == pytest.approx(sum(of_tasks) / 2) and min(of_tasks) >= 0
    assert row["held_out_kl"] > 0 and 0 <= row["tar"] <= 1

    rows = {("greedy", seed, None): {**row, "option_accuracy count": 0.5 + seed / 10} for seed in (1, 2)}
    page = markdown("pair", checked, rows, command="x")
    blank, other = (row[f"option_accuracy count ({shown})"] for shown in ("blank", "shuffled"))
    assert "| arm | count | place |" in page
    assert f" 0.65 ± 0.64 ({blank:.2f}, {other:.2f}) |" in page  # Student's t of two: 12.706 x .05


def test_the_measure_of_drawn_scenes_refuses_a_student_that_sees_nothing() -> None:
    from types import SimpleNamespace

    from selectkd.evals.studies.measures import MEASURES

    with pytest.raises(ConfigError, match="needs a student that sees images"):
        MEASURES["vision"](SimpleNamespace(vision=None), None)


def test_samples_are_shown_with_their_images(
    recipe: Recipes, folder_of: Any, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "samples.html"
    assert main(["data", "show", recipe(), "-n", "6", "--page", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "<<image 1: 0.png, 24 x 20, " in printed and "<<image 2: 2.png, 30 x 16, " in printed
    assert "IMG_CONTEXT" not in printed and "[[a cat" in printed
    text = page.read_text("utf-8")
    assert text.count('src="data:image/png;base64,') == 5 and "<script" not in text
    assert "<mark>a cat" in text and "img-src data:" in text
    # a file alone, with the processor of a model that is named
    command = ["data", "show", str(records), "-n", "1"]
    assert main([*command, "--tokenizer", str(folder_of("internvl"))]) == 0
    assert "<<image 1: 0.png, 24 x 20, " in capsys.readouterr().out
    assert main([*command, "--page", str(page)]) == 2 and "--tokenizer" in capsys.readouterr().err
