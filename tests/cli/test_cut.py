"""``selectkd cut``: a student cut once, which a run then trains as any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from selectkd.cli import main
from training.tiny import tiny_llama, write_pair


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    path = tmp_path / "recipe.yaml"
    content = {
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"from_teacher": {"layers": 2}},
        "data": {"sources": [{"path": str(tmp_path / "text.jsonl")}], "evaluation": 0.25},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 1,
            "batch_size": 2,
            "max_length": 32,
            "max_prompt_length": 16,
        },
    }
    path.write_text(json.dumps(content), "utf-8")
    return path


def test_a_cut_is_the_student_that_a_run_would_choose_and_trains_as_a_model(
    recipe: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(["cut", str(recipe), "--out", str(tmp_path / "cut"), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "with layers" in told and "nats" in told
    assert main(["doctor", str(recipe), "--json", "-", "--device", "cpu"]) == 0
    found = {one["check"]: one["message"] for one in json.loads(capsys.readouterr().out)}
    kept = told.split("with layers ")[1].split(", held-out")[0]
    assert f"[{kept}]" in found["models"] and "selectkd cut" in found["models"]
    cut = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    for new, old in enumerate(map(int, kept.split(", "))):
        own = cut.model.layers[new].state_dict()
        for name, tensor in teacher.model.layers[old].state_dict().items():
            assert tensor.equal(own[name])
    changes = ["--set", f"student.model={tmp_path / 'cut'}"]
    assert main(["train", str(recipe), *changes, "--device", "cpu"]) == 0


def test_a_recipe_that_names_its_student_has_nothing_to_cut(
    recipe: Path, tmp_path: Path, capsys: Any
) -> None:
    changes = ["--set", f"student.model={tmp_path / 'student'}"]
    assert main(["cut", str(recipe), "--out", str(tmp_path / "cut"), *changes]) == 2
    assert "nothing to cut" in capsys.readouterr().err and not (tmp_path / "cut").exists()
