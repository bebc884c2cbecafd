"""Recipes with images, run: cached as live, accumulated as whole, frozen, with adapters, cut from the teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import CacheError, ConfigError
from selectkd.models.load import load_model, load_vision
from selectkd.training.checks import prepare
from selectkd.training.run import train
from vision import tiny
from vision.conftest import Recipes


def ran(path: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of a run and its student's weights."""
    folder = train(load_recipe(path, [])).run_dir
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], load_file(
        folder / "student" / "model.safetensors"
    )


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> bool:
    return all(bool((one[name] - other[name]).abs().max() <= tolerance) for name in one)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "paligemma"])
def test_a_run_from_an_exact_cache_equals_one_with_a_live_teacher(
    recipe: Recipes, folder_of: Any, tmp_path: Path, family: str
) -> None:
    if family == "paligemma":
        data: dict[str, Any] = {"data": {"sources": [{"path": str(tiny.bare(tmp_path / "bare"))}]}}
    else:
        data = {}
    live, _ = ran(recipe("live", family, **data))
    model = str(folder_of(family, 1))
    best = {"payload": "top_k", "k": tiny.VOCABULARY}
    for payload in ({"payload": "hidden"}, *([best] if family == "internvl" else [])):
        cache = tmp_path / payload["payload"]
        teacher = {"cache": str(cache), "model": model, "precision": "float32", **payload}
        path = recipe(f"of-{cache.name}", family, teacher=teacher, **data)
        assert main(["cache", "build", path]) == 0
        assert main(["cache", "verify", path]) == 0
        cached, _ = ran(path)
        torch.testing.assert_close(cached, live, rtol=0, atol=1e-5)


def test_micro_batches_of_one_sum_to_the_whole_step(recipe: Recipes) -> None:
    six = {"training": {"max_steps": 1, "batch_size": 6}}
    whole = ran(recipe("whole", training={**six["training"]}))
    parts = ran(recipe("parts", training={"max_steps": 1, "batch_size": 1, "gradient_accumulation": 6}))
    torch.testing.assert_close(parts[0], whole[0], rtol=0, atol=1e-6)
    assert close(parts[1], whole[1], 1e-5)


def test_frozen_parts_stay_as_they_are_and_the_student_opens_with_its_processor(
    recipe: Recipes, folder_of: Any, tmp_path: Path
) -> None:
    before = load_file(folder_of("internvl", 2) / "model.safetensors")
    _, after = ran(recipe(training={"freeze": ["vision_tower", "projector"]}))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("language_model" in name or "lm_head" in name for name in moved)
    folder = tmp_path / "run" / "student"
    ours, theirs = load_vision(folder), load_vision(folder_of("internvl", 2))
    assert ours is not None and theirs is not None and ours.fingerprint == theirs.fingerprint
    assert load_model(folder).tokenizer.chat_template == ours.processor.chat_template


def test_adapters_sit_on_the_language_model_alone(recipe: Recipes, folder_of: Any) -> None:
    before = load_file(folder_of("llava", 2) / "model.safetensors")
    _, after = ran(recipe(family="llava", training={"lora": {"r": 4, "dropout": 0.0}}))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("language_model" in name and "_proj" in name for name in moved)


@pytest.mark.parametrize("choose", ["measured", "even"])
def test_a_student_cut_from_its_teacher_keeps_tower_and_projector(
    recipe: Recipes, folder_of: Any, choose: str
) -> None:
    teacher = folder_of("internvl", 1, 3)
    path = recipe(
        teacher={"model": str(teacher)}, student={"from_teacher": {"layers": 2, "choose": choose}},
        training={"freeze": ["vision_tower", "projector"]},
    )  # fmt: skip
    _, student = ran(path)
    whole = load_file(teacher / "model.safetensors")
    kept = [name for name in student if "vision_tower" in name or "projector" in name]
    assert kept and all(torch.equal(student[name], whole[name]) for name in kept)
    assert not any(".layers.2." in name for name in student if "language_model" in name)


def test_streamed_records_have_their_images(recipe: Recipes) -> None:
    losses, _ = ran(recipe(data={"streaming": True}))
    assert all(torch.isfinite(torch.tensor(losses)))


def test_what_images_do_not_go_with_is_refused_by_name(
    recipe: Recipes, folder_of: Any, tmp_path: Path
) -> None:
    def refusal(**sections: Any) -> str:
        with pytest.raises(ConfigError) as error:
            prepare(load_recipe(recipe("refused", **sections), []))
        return str(error.value)

    assert "data.packing" in refusal(data={"packing": True})
    assert "training.sharding" in refusal(training={"sharding": {}})
    server = {
        "url": "http://127.0.0.1:1",
        "kind": "sglang",
        "k": 10,
        "tokenizer": str(folder_of("internvl", 1)),
    }
    assert "(kind: sglang) gets token ids alone" in refusal(teacher=server)
    assert "sees no images" in refusal(teacher={"model": _text_model(tmp_path)})
    other = tiny.saved("internvl", tmp_path / "other", seed=1)
    settings = json.loads((other / "processor_config.json").read_text())
    (other / "processor_config.json").write_text(json.dumps({**settings, "image_seq_length": 8}))
    assert "image_seq_length: 8 of the teacher, 4 of the student" in refusal(teacher={"model": str(other)})


def _text_model(folder: Path) -> str:
    import transformers as hf

    tokenizer = tiny.tokenizer_of("internvl")
    text = tiny.config_of("llava", tokenizer).text_config
    hf.AutoModelForCausalLM.from_config(text).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    return str(folder / "text")


def test_a_cache_of_another_processor_is_refused_by_name(
    recipe: Recipes, folder_of: Any, tmp_path: Path
) -> None:
    teacher = {"cache": str(tmp_path / "cache"), "model": str(folder_of("internvl", 1))}
    assert main(["cache", "build", recipe("build", teacher=teacher)]) == 0
    other = tiny.saved("internvl", tmp_path / "other", seed=2)
    settings = json.loads((other / "processor_config.json").read_text())
    settings["image_processor"]["max_patches"] = 2
    (other / "processor_config.json").write_text(json.dumps(settings))
    path = recipe("other-run", teacher={"cache": str(tmp_path / "cache")}, student={"model": str(other)})
    with pytest.raises(CacheError, match="images: "):
        prepare(load_recipe(path, []))
