"""Rounding for texts: the file's own numbers, outputs that move less, and nothing where nothing is to round."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from export.pairs import byte_level, tiny_model
from selectkd.cli import main
from selectkd.errors import ConfigError
from selectkd.evals.export import REPORT
from selectkd.models.export.gguf import calibrated as calibrating
from selectkd.models.export.gguf.calibrated import calibrated, rounded
from selectkd.models.export.gguf.file import write_gguf
from selectkd.models.export.gguf.reading import read_gguf
from selectkd.models.load import Loaded

KINDS = ("q8_0", "q5_1", "q4_0")


def stored(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """What gguf's own quantiser makes of a weight."""
    kind_of = GGMLQuantizationType[kind.upper()]
    return torch.from_numpy(np.asarray(quants.dequantize(quants.quantize(weight.numpy(), kind_of), kind_of)))


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [48, 96] and inputs [400, 96] that move together, as those of a model do."""
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(96, 96, generator=generator) * torch.logspace(0, -2, 96)[:, None]
    return torch.randn(48, 96, generator=generator), torch.randn(400, 96, generator=generator) @ mixing


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_move_less_than_by_rounding_each_weight_alone(kind: str, layer: Any) -> None:
    weight, inputs = layer
    found = rounded(weight, inputs.T @ inputs, kind)
    apart, alone = ((inputs @ (weight - one).T).square().mean() for one in (found, stored(weight, kind)))
    assert apart < 0.5 * alone


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_very_numbers_that_were_chosen(kind: str, layer: Any) -> None:
    weight, inputs = layer
    weight[5, 32:64] = 0  # a block without a scale
    weight[6, 0:32] = 0.25  # one whose weights are all the same
    found = rounded(weight, inputs.T @ inputs, kind)
    assert torch.equal(stored(found, kind), found)
    again = rounded(found, inputs.T @ inputs, kind)
    assert torch.equal(again, found), "a student trained with these numbers keeps them"


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_inputs_that_have_nothing_in_common_round_each_weight_to_its_nearest(
    scale: float, layer: Any
) -> None:
    weight, _ = layer
    found = rounded(weight, torch.eye(96) * scale, "q8_0")
    alone = stored(weight, "q8_0")
    assert ((found - weight).abs() <= (alone - weight).abs() + 1e-6).all()


def test_a_model_in_several_groups_reads_the_texts_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    model, texts = tiny_model("llama"), [[5, 6, 7, 8, 9, 10], [11, 12, 13]]
    before = {name: one.clone() for name, one in model.named_parameters()}
    at_once = calibrated(model, texts, "q8_0")
    monkeypatch.setattr(calibrating, "MOST", 1)
    singly = calibrated(model, texts, "q8_0")
    layers = [name for name, one in at_once.named_modules() if isinstance(one, torch.nn.Linear)]
    assert at_once.lm_head.weight is at_once.model.embed_tokens.weight, "a tied embedding is the head's"
    for name in layers:
        for found in (at_once, singly):
            weight = found.get_submodule(name).weight.detach()
            assert torch.equal(stored(weight, "q8_0"), weight), name
            assert not torch.equal(weight, before[f"{name.replace('lm_head', 'model.embed_tokens')}.weight"])
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]), "the student itself stays as it is"
        if "norm" in name:
            assert torch.equal(at_once.get_parameter(name), weight), name


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_what_is_written_comes_back(family: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(family), byte_level()
    chosen = calibrated(model, [[5, 6, 7, 8, 9, 10]] * 2, "q4_0")
    write_gguf(chosen, tokenizer, tmp_path / "x.gguf", kind="q4_0", ends={2}, name="x")
    back: Any = read_gguf(tmp_path / "x.gguf", Loaded(model, tokenizer, "x", None)).model
    for name, one in chosen.named_modules():
        if isinstance(one, torch.nn.Linear):
            assert torch.equal(back.get_parameter(f"{name}.weight"), one.weight), name


def test_the_verb_rounds_for_records_that_it_does_not_measure_on(tmp_path: Path, capsys: Any) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    byte_level().save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    rows = [{"prompt": f"the number {i} is", "completion": f" {i * i} as a square"} for i in range(12)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verb = [
        "export",
        str(tmp_path / "model"),
        "--to",
        "gguf",
        "--out",
        str(tmp_path / "out"),
        "--tokens",
        "4",
    ]
    assert (
        main([*verb, "--type", "q8_0", "--prompts", str(text), "--limit", "5", "--calibrate", str(text)]) == 0
    )
    notes = json.loads((tmp_path / "out" / REPORT).read_text())["notes"]
    assert notes["calibration"]["texts"] == 7 and "7 records" in capsys.readouterr().out
    assert (
        main([*verb, "--type", "q8_0", "--prompts", str(text), "--calibrate", str(text)])
        == ConfigError.exit_code
    )
    assert "no record beside those" in capsys.readouterr().err
    assert main([*verb, "--type", "f16", "--calibrate", str(text)]) == ConfigError.exit_code
    assert "--type is f16" in capsys.readouterr().err


def test_a_token_with_enormous_hidden_states_counts_as_one() -> None:
    layer = torch.nn.Linear(32, 8)
    inputs = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    found: list[torch.Tensor] = []
    for scale in (1.0, 1e4):
        sums: dict[torch.nn.Linear, torch.Tensor] = {}
        with calibrating._watched([layer], sums):
            layer(torch.cat([inputs[:1] * scale, inputs[1:]])[None])
        found.append(sums[layer])
    assert torch.allclose(found[0], found[1], atol=1e-5) and abs(found[0].trace() - 5) < 1e-4
