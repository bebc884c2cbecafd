"""A student whose base lies in 4 bits (bitsandbytes), under adapters that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from faults.test_resume import StopsAt
from faults.tiny_run import recipe_for, write_dropping_pair
from selectkd.config import Recipe
from selectkd.config.load import recipe_from
from selectkd.errors import Preempted
from selectkd.models.load import load_model
from selectkd.models.lora import add_lora
from selectkd.models.quantized import FOUR, BitsAndBytes, dequantized, quantized, stored_bytes
from selectkd.training.activations import checkpoint_activations
from selectkd.training.assembly import assemble
from selectkd.training.checkpoint.folder import all_in
from selectkd.training.heldout.evaluation import evaluate
from selectkd.training.preflight.doctor import doctor
from selectkd.training.preflight.estimate import estimate
from selectkd.training.run import train
from training.tiny import tiny_llama, tiny_tokenizer

pytest.importorskip("bitsandbytes")

IDS = torch.arange(3, 21).reshape(2, 9)
FORMS = [("nf4", True), ("nf4", False), ("fp4", True)]


def qlora(pair: Path, run: Path, *, cut: bool = False, **training: Any) -> Recipe:
    content = recipe_for(pair, run, lora=True, **training).model_dump(exclude_none=True)
    content["student"]["quantization"] = "bitsandbytes-4bit"
    if cut:
        del content["student"]["model"]
        content["student"]["from_teacher"] = {"layers": 1, "choose": [0]}
    return recipe_from(content)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    return write_dropping_pair(tmp_path_factory.mktemp("pair"))


def adapted(model: Any) -> Any:
    torch.manual_seed(0)
    found: Any = add_lora(model, r=2, alpha=4, dropout=0.0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return found.eval()


def held(model: Any) -> int:
    """Bytes of a model's tensors and of the scales of its 4-bit weights."""
    total = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    total += sum(buffer.nbytes for buffer in model.buffers())
    for state in (getattr(p, "quant_state", None) for p in model.parameters()):
        if state is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


@pytest.mark.parametrize(("kind", "double"), FORMS)
def test_a_4_bit_base_is_the_same_from_disk_and_from_memory_and_merges_to_what_it_was(
    kind: str, double: bool, tmp_path: Path
) -> None:
    plain = tiny_llama(0).eval()
    plain.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    bits = BitsAndBytes(FOUR, kind, double, torch.float32, "cpu")
    loaded, cut = load_model(tmp_path, quantization=bits).model, quantized(plain, bits)
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, cut(IDS).logits)
        assert not torch.equal(loaded(IDS).logits, plain(IDS).logits)
    assert loaded.lm_head.weight.dtype == torch.float32 and held(loaded) == stored_bytes(plain, double)
    student = adapted(loaded)
    with torch.no_grad():
        before = student(IDS).logits
        merged: Any = dequantized(student, torch.float32)
        # W x + B (A x) against (W + B A) x in fp32: rounding of sums of 32 and 64 numbers
        torch.testing.assert_close(merged(IDS).logits, before, rtol=0, atol=5e-5)
        assert torch.equal(student(IDS).logits, before)
    assert not any("lora" in name or "absmax" in name for name in merged.state_dict())
    assert not hasattr(merged.config, "quantization_config")


def test_activations_computed_again_have_the_same_gradient() -> None:
    gradients = []
    for again in (False, True):
        student = quantized(tiny_llama(0), BitsAndBytes(FOUR, double=True, device="cpu"))
        if again:
            checkpoint_activations(student)
        student = adapted(student).train()
        student(IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in student.named_parameters() if p.requires_grad})
    assert gradients[0] and all("lora" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) and (gradient.abs().max() > 0)


@pytest.mark.parametrize("cut", [False, True], ids=["from disk", "cut"])
def test_a_run_keeps_adapters_alone_goes_on_to_the_same_bytes_and_saves_what_it_trained(
    cut: bool, pair: Path, tmp_path: Path
) -> None:
    whole = train(qlora(pair, tmp_path / "whole", cut=cut))
    if not cut:
        stops = qlora(pair, tmp_path / "stops")
        with pytest.raises(Preempted):
            train(stops, progress=StopsAt(3))
        assert train(stops).resumed_from == 3
        files = [tmp_path / name / "student" / "model.safetensors" for name in ("whole", "stops")]
        assert files[0].read_bytes() == files[1].read_bytes()
    newest = all_in(tmp_path / "whole" / "checkpoints")[-1]
    stored = [name for path in newest.glob("*.safetensors") for name in safe_open(path, "pt").keys()]  # noqa: SIM118
    assert stored and not any("base_layer" in name or "embed" in name for name in stored)
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text("utf-8"))
    assert manifest["student"]["quantization"] == {"name": FOUR, "type": "nf4", "double": True}
    assembly = assemble(qlora(pair, tmp_path / "whole", cut=cut))
    saved = load_model(tmp_path / "whole" / "student").model
    again = evaluate(saved, assembly.teacher, assembly.heldout, assembly.objective, seed=42)
    assert whole.after is not None and again.kl == pytest.approx(whole.after.kl, rel=1e-4)  # fp32, merged


def test_doctor_and_estimate_know_the_4_bit_base(pair: Path, tmp_path: Path) -> None:
    recipe = qlora(pair, tmp_path / "run")
    findings = list(doctor(recipe))
    assert all(finding.ok for finding in findings), findings
    content = recipe.model_dump(exclude_none=True)
    del content["student"]["quantization"]
    plain, ours = estimate(recipe_from(content)), estimate(recipe)
    assert ours.student < plain.student and ours.saved == plain.saved and ours.optimizer == plain.optimizer
