"""Weights rounded as torchao rounds them as they train, and the integers that torchao stores of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from faults.tiny_run import recipe_for, write_dropping_pair
from selectkd.models.fake_quantized import fake_quantize, rounded_layers
from selectkd.models.load import load_model
from selectkd.training.run import train
from training.tiny import tiny_llama

pytest.importorskip("torchao")

SCHEMES = [
    {"name": "int4", "group_size": 16},
    {"name": "int4"},
    {"name": "int8"},
    {"name": "int8", "group_size": 32},
]
IDS = torch.arange(3, 21).reshape(2, 9)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_rounding_has_as_many_values_as_its_bits_and_a_gradient(scheme: dict[str, Any]) -> None:
    model = tiny_llama(0)
    fake_quantize(model, **scheme)
    for layer in rounded_layers(model):
        width = layer.weight.shape[1]
        group = scheme.get("group_size") or (32 if scheme["name"] == "int4" else width)
        for values in layer.rounding(layer.weight).unflatten(-1, (-1, group)).flatten(0, 1):
            assert len(values.unique()) <= 2 ** int(scheme["name"][3:])
    model(IDS, labels=IDS).loss.backward()
    assert all(layer.weight.grad.abs().max() > 0 for layer in rounded_layers(model))


@pytest.mark.parametrize("scheme", SCHEMES[1:2], ids=str)
def test_a_run_leaves_the_integers_of_the_weights_that_it_trained(
    scheme: dict[str, Any], tmp_path: Path
) -> None:
    pair = write_dropping_pair(tmp_path / "pair")
    result = train(recipe_for(pair, tmp_path / "run", fake_quantization=scheme))
    plain = load_model(tmp_path / "run" / "student").model
    stored: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"student-{scheme['name']}")
    for name, module in stored.named_modules():
        if name.endswith("_proj"):
            assert torch.equal(module.weight.dequantize(), plain.get_submodule(name).weight), name
            assert module.weight.qdata.dtype == torch.int8
    with torch.no_grad():
        torch.testing.assert_close(stored.eval()(IDS).logits, plain(IDS).logits, rtol=0, atol=1e-5)
    kl = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))["student"]["rounding"]["kl"]
    assert result.after is not None and kl["after"]["rounded"] == result.after.kl
