"""Weights rounded as they train: as GGUF rounds them, in every forward pass, and so in the student that is saved."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from faults.test_resume import StopsAt
from faults.tiny_run import recipe_for, write_dropping_pair
from selectkd.errors import ConfigError, Preempted
from selectkd.models.export.gguf.families import family_of
from selectkd.models.export.gguf.tensors import quantized, stored_as, tensors_of
from selectkd.models.fake_quantized import GGUF_TYPES, fake_quantize, rounded, rounded_layers, unrounded
from selectkd.models.head import head_of
from selectkd.models.load import load_model
from selectkd.models.save import save_student
from selectkd.training.preflight.estimate import estimate
from selectkd.training.run import train
from training.tiny import tiny_llama, tiny_tokenizer

SCHEME = {"name": "q4_0"}
IDS = torch.arange(3, 21).reshape(2, 9)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    return write_dropping_pair(tmp_path_factory.mktemp("pair"))


def hard_weights() -> torch.Tensor:
    """Rows of 64: normal, of one value, zero, with scales that fp16 cannot hold exactly or at all, halves, bfloat16."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(64, 64, generator=generator)
    halves = torch.randint(-254, 255, (8, 64), generator=generator) / 2
    halves[:, ::32] = 127.0
    signs = torch.randint(0, 2, (8, 64), generator=generator) * 2.0 - 1
    rows = [
        normal,
        normal * 1e-6,
        normal * 1e-8,
        normal * 1e3,
        halves,
        signs,
        torch.zeros(2, 64),
        normal.bfloat16().float(),
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_a_weight_is_rounded_as_gguf_rounds_it_and_once_is_enough(name: str) -> None:
    weight, kind = hard_weights(), gguf.GGMLQuantizationType[name.upper()]
    ours = GGUF_TYPES[name](weight)
    stored = gguf.quants.quantize(weight.numpy(), kind)
    assert np.array_equal(ours.numpy(), gguf.quants.dequantize(stored, kind))
    again = gguf.quants.quantize(ours.numpy(), kind)
    assert np.array_equal(gguf.quants.dequantize(again, kind), ours.numpy())
    assert torch.equal(GGUF_TYPES[name](ours), ours)
    assert (ours != weight).any()


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_an_export_of_that_type_has_the_very_numbers_that_were_trained(name: str) -> None:
    model = tiny_llama(0)
    fake_quantize(model, name)
    student = rounded(model)
    stored = 0
    for tensor_name, tensor in tensors_of(student, family_of(student.config)):
        kind = stored_as(tensor_name, tensor, name)
        if kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
            stored += 1
            assert np.array_equal(gguf.quants.dequantize(quantized(tensor, kind), kind), tensor.numpy()), (
                tensor_name
            )
    assert stored == 2 * 7 + 1  # linear layers of two blocks, and the tied head


def test_the_gradient_is_that_of_a_model_of_the_rounded_weights() -> None:
    model = tiny_llama(0)
    fake_quantize(model, **SCHEME)
    other = copy.deepcopy(model)
    for layer in rounded_layers(other):
        layer.weight.data = layer.rounding(layer.weight.data)
    with unrounded(other):
        losses = [one(IDS, labels=IDS).loss for one in (model, other)]
        for loss in losses:
            loss.backward()
    assert losses[0] == losses[1]
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name
    assert torch.equal(head_of(model).weight, model.lm_head.rounding(model.lm_head.weight))
    assert not any("rounding" in name for name in model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_folder_holds_the_weights_that_the_student_multiplied_with(dtype: Any, tmp_path: Path) -> None:
    model = tiny_llama(0, dtype=dtype).eval()
    fake_quantize(model, **SCHEME)
    before = model(IDS).logits
    save_student(model, tiny_tokenizer(), tmp_path / "s", "# s\n", dtype="bfloat16")
    assert torch.equal(model(IDS).logits, before)  # it goes on training
    loaded = load_model(tmp_path / "s").model
    assert dtype != torch.float32 or torch.equal(loaded(IDS).logits, before)
    for name, layer in model.named_modules():
        if layer in rounded_layers(model):
            weight = loaded.get_submodule(name).weight
            assert torch.equal(weight, layer.rounding(layer.weight)) and torch.equal(
                layer.rounding(weight), weight
            )


def test_a_run_trains_what_it_saves_states_its_kl_and_goes_on_to_the_same_bytes(
    pair: Path, tmp_path: Path
) -> None:
    runs = [recipe_for(pair, tmp_path / name, fake_quantization=SCHEME) for name in ("whole", "stops")]
    whole = train(runs[0])
    with pytest.raises(Preempted):
        train(runs[1], progress=StopsAt(3))
    train(runs[1])
    files = [tmp_path / name / "student" / "model.safetensors" for name in ("whole", "stops")]
    assert files[0].read_bytes() == files[1].read_bytes()
    found = [
        json.loads((tmp_path / name / "manifest.json").read_text("utf-8")) for name in ("whole", "stops")
    ]
    rounding = found[0]["student"]["rounding"]
    assert rounding == found[1]["student"]["rounding"] and rounding["name"] == "q4_0"
    for when, kl in rounding["kl"].items():
        assert kl["rounded"] == found[0][when]["kl"] and kl["unrounded"] not in (None, kl["rounded"])
    assert rounding["kl"]["after"]["rounded"] < rounding["kl"]["before"]["rounded"]
    assert train(runs[0]).unrounded == whole.unrounded  # read from the finished run
    student = load_model(tmp_path / "whole" / "student").model
    for name, weight in student.named_parameters():
        kind = "q8_0" if "embed" in name else "q4_0"
        assert weight.ndim == 1 or torch.equal(GGUF_TYPES[kind](weight), weight), name


def test_memory_counts_the_rounded_weights(pair: Path) -> None:
    plain, ours = (
        estimate(recipe_for(pair, Path("unused"), **more)) for more in ({}, {"fake_quantization": SCHEME})
    )
    linear = sum(p.nbytes for name, p in tiny_llama(2, layers=1).named_parameters() if "proj" in name)
    assert ours.activations - plain.activations >= linear
    assert ours.merging >= 0 and ours.student == plain.student


REFUSED = {
    "adapters": ({"lora": {"r": 2}, "fake_quantization": "q4_0"}, "does not go with lora"),
    "parts": ({"sharding": {}, "fake_quantization": "q4_0"}, "does not go with sharding"),
    "blocks of GGUF": ({"fake_quantization": {"name": "q8_0", "group_size": 64}}, "blocks of 32"),
    "an unknown one": ({"fake_quantization": "q4_k"}, "q8_0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_rounded_is_refused_as_the_recipe_is_read(case: str, pair: Path) -> None:
    training, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        recipe_for(pair, Path("unused"), **training)


def test_rows_that_are_not_whole_blocks_are_refused_by_name() -> None:
    model = tiny_llama(0, hidden=48)
    with pytest.raises(ConfigError, match=r"q_proj has 48 weights, not a multiple of 32"):
        fake_quantize(model, "q8_0")


def test_a_quantised_base_without_adapters_or_in_parts_is_refused(pair: Path) -> None:
    for training, message in (
        ({}, "set training.lora"),
        ({"lora": True, "sharding": {}}, "whole on each rank"),
    ):
        content = recipe_for(pair, Path("unused"), **training).model_dump(exclude_none=True)
        content["student"]["quantization"] = "bitsandbytes-4bit"
        with pytest.raises(ConfigError, match=message):
            from selectkd.config.load import recipe_from

            recipe_from(content)
