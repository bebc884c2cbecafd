"""The estimate by device, precision and optimizer, beside what torch really keeps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import Trainer, TrainingArguments

from selectkd.cli import main
from selectkd.config import recipe_from
from selectkd.models.head import backbone
from selectkd.training.optimizer import state_bytes, trainers_name
from selectkd.training.preflight.estimate import Memory, _kept, activations, estimate
from training.tiny import recipe_of, tiny_llama, write_pair

FREE = {"output_dir": "unused", "max_steps": 1, "batch_size": 2, "max_length": 32, "max_prompt_length": 16}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=4))
    return root


def of(folders: Path, device: str = "cpu", **training: Any) -> Memory:
    return estimate(recipe_from(recipe_of(folders, training={**FREE, **training})), device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_under_autocast_are_what_autograd_keeps(dtype):
    b, t = 2, 24
    with torch.device("meta"):
        shape = tiny_llama(2, hidden=64, dtype=dtype)
    expected = activations(shape, b, t, autocast=True)
    model = tiny_llama(2, hidden=64, dtype=dtype).train()
    model.config._attn_implementation = "sdpa"
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    mask = torch.ones(b, 1, t, t)  # so that the attention is the one the estimate counts, with a mask
    with _kept() as storages, torch.autocast("cpu", dtype=torch.bfloat16):
        backbone(model)(input_ids=torch.ones(b, t, dtype=torch.long), attention_mask=mask)
    kept = sum(size for storage, size in storages.items() if storage not in own)
    assert abs(expected / kept - 1) < 0.1


def test_no_share_of_the_process_counts_as_an_accelerators_memory(folders):
    on_gpu, on_cpu = (of(folders, device, precision="fp32") for device in ("cuda", "cpu"))
    assert on_cpu.process > 0 and on_gpu.process == 0
    assert on_gpu.student == on_cpu.student and on_gpu.optimizer == on_cpu.optimizer


def test_each_precision_is_counted_in_its_dtypes(folders):
    found = {name: of(folders, "cuda", precision=name) for name in ("fp32", "bf16", "bf16-pure", "auto")}
    fp32, bf16, pure = found["fp32"], found["bf16"], found["bf16-pure"]
    assert found["auto"] == bf16
    assert (bf16.student, bf16.gradient, bf16.optimizer) == (fp32.student, fp32.gradient, fp32.optimizer)
    assert bf16.teacher == pytest.approx(fp32.teacher / 2, rel=0.01)
    for part in ("student", "gradient", "optimizer", "saved", "teacher"):
        assert getattr(pure, part) == pytest.approx(getattr(fp32, part) / 2, rel=0.01), part
    adapted = of(folders, "cuda", precision="bf16", lora={"r": 2})
    assert adapted.student < 0.7 * bf16.student


def test_a_teachers_own_dtype_counts(folders):
    content = recipe_of(folders, training={**FREE, "precision": "bf16"})
    content["teacher"]["dtype"] = "float32"
    assert estimate(recipe_from(content)).teacher == of(folders, precision="fp32").teacher


def test_offloaded_activations_leave_an_accelerator_and_stay_in_main_memory(folders):
    kept, gone = (
        of(folders, "cuda", activation_offload=wanted, precision="fp32") for wanted in (False, True)
    )
    assert 0 <= gone.activations <= kept.activations
    on_cpu = [of(folders, activation_offload=wanted).activations for wanted in (False, True)]
    assert on_cpu[0] == on_cpu[1]


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizers_state_is_what_it_keeps_after_a_step(name, dtype):
    student = tiny_llama(2, dtype=dtype)
    args = TrainingArguments(optim=trainers_name(name), report_to="none", use_cpu=True)
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, student)
    made = kind(student.parameters(), **options)
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    kept = [leaf for leaf in tree_leaves(list(made.state.values())) if isinstance(leaf, torch.Tensor)]
    real = sum(tensor.numel() * tensor.element_size() for tensor in kept if tensor.ndim)
    assert sum(state_bytes(name, parameter) for parameter in student.parameters()) == real


def test_eight_bit_moments_are_a_quarter_of_fp32_ones_for_large_tensors():
    large, small = torch.empty(256, 256), torch.empty(64)
    assert state_bytes("adamw_8bit", large) == state_bytes("adamw", large) // 4
    assert state_bytes("adamw_8bit", small) == state_bytes("adamw", small)


def test_the_verb_estimates_for_a_device_that_is_not_here(folders, tmp_path, capsys):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe_of(folders, training=FREE)), "utf-8")
    assert main(["estimate", str(path), "--device", "cuda", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["process"] == 0
    assert main(["estimate", str(path), "--device", "gpu"]) == 2
    assert "gpu" in capsys.readouterr().err


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj"]}])
def test_a_sharded_student_is_counted_as_one_rank_holds_it(lora, folders, monkeypatch):
    """A part of all, and whole what is at work; adapters are in no parts."""
    whole, half = (of(folders, lora=lora, sharding=sharding) for sharding in (None, {"fsdp": 2}))
    model = tiny_llama(2)
    weights = sum(p.numel() for p in model.parameters()) * 4
    near = 0.02 * weights  # buffers, and adapters within a layer
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 4
    around = weights - len(model.model.layers) * layer
    assert half.student - whole.student == pytest.approx(around + 2 * layer - weights / 2, abs=near)
    assert half.optimizer == (whole.optimizer if lora else whole.optimizer // 2)
    assert half.gradient == pytest.approx(whole.gradient if lora else weights / 2 + around + layer, abs=near)
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert of(folders, lora=lora, sharding={"replicate": 2}) == replace(half, process=ANY)
