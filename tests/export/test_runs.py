"""Exports of runs: of a checkpoint, of an adapter, of a run that is not finished; and ONNX, whose trace takes long."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from export.pairs import byte_level, student, tiny_model
from selectkd.cli import main
from selectkd.config import recipe_from
from selectkd.evals.export import REPORT, Texts, export
from selectkd.evals.runs import load_student_at, recipe_of
from selectkd.models.export.student import Options
from selectkd.models.export.targets import TARGETS
from selectkd.models.load import load_model
from selectkd.models.lora import merge
from selectkd.training.run import train
from training.tiny import recipe_of as tiny_recipe
from training.tiny import tiny_llama, write_pair


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished LoRA run of four steps, with the checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("runs")
    write_pair(root, tiny_llama(1))
    training = {
        "output_dir": str(root / "run"), "max_steps": 4, "save_every": 2, "batch_size": 4, "max_length": 32,
        "learning_rate": 1e-2, "lora": {"r": 2, "dropout": 0.0},
    }  # fmt: skip
    train(recipe_from(tiny_recipe(root, training=training)))
    return root / "run"


def verb(*words: str) -> int:
    return main(["export", *words, "--limit", "4", "--tokens", "4"])


def test_the_newest_checkpoint_is_the_student_and_another_is_not(run: Path, tmp_path: Path) -> None:
    ids = torch.arange(5, 25)[None]
    newest, path, _ = load_student_at(run, None)
    left = load_model(run / "student").model(ids).logits
    assert path.endswith("step-00000004")
    assert torch.allclose(merge(newest.model)(ids).logits, left, atol=1e-5)
    assert verb(str(run), "--to", "merged", "--checkpoint", "2", "--out", str(tmp_path / "two")) == 0
    content = json.loads((tmp_path / "two" / REPORT).read_bytes())
    assert content["checkpoint"].endswith("step-00000002") and content["run"] == str(run)
    assert not torch.allclose(load_model(tmp_path / "two").model(ids).logits, left, atol=1e-3)


def test_a_run_that_is_not_finished_gives_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    import shutil

    half = tmp_path / "half"
    shutil.copytree(run, half)
    shutil.rmtree(half / "student")
    recipe = json.loads((half / "manifest.json").read_text("utf-8"))["config"]
    (half / "manifest.json").unlink()
    found = recipe_of(half)
    assert found["student"]["model"] == recipe["student"]["model"]
    assert found["training"]["lora"] == recipe["training"]["lora"]
    assert verb(str(half), "--to", "hf", "--out", str(tmp_path / "out")) == 0
    ids = torch.arange(5, 25)[None]
    ours, theirs = (load_model(one).model(ids).logits for one in (run / "student", tmp_path / "out"))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_an_adapter_leaves_alone_and_is_read_back_on_its_base(run: Path, tmp_path: Path) -> None:
    assert verb(str(run), "--to", "adapter", "--out", str(tmp_path / "out")) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", REPORT} <= names
    assert "model.safetensors" not in names
    content = json.loads((tmp_path / "out" / REPORT).read_bytes())
    assert content["read_back_by"] == "peft" and content["fidelity"]["kl"]["high"] < 1e-6


def test_a_step_without_a_checkpoint_names_those_there_are(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert verb(str(run), "--to", "hf", "--checkpoint", "3", *out) == 2
    assert "checkpoints of the steps 4, 2" in capsys.readouterr().err
    assert verb(str(run / "student"), "--to", "hf", "--checkpoint", "3", *out) == 2
    assert "is of a run" in capsys.readouterr().err
    assert verb(str(run / "student"), "--to", "adapter", *out) == 2
    assert "not trained with LoRA" in capsys.readouterr().err


def test_onnx_runtime_computes_the_students_logits_at_any_length(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("transformers.exporters")
    one = student(tiny_model("llama"), byte_level())
    texts = Texts([[5, 6, 7], [8, 9, 10, 11, 12]], ["a 1"], 4, "made")
    report = export(one, TARGETS["onnx"], Options("f32", tmp_path / "out"), texts, about={"target": "onnx"})
    assert report.content["read_back_by"].startswith("ONNX Runtime") and report.fidelity.greedy_same == 2
    assert (tmp_path / "out" / "model.onnx").is_file() and (tmp_path / "out" / "tokenizer.json").is_file()
