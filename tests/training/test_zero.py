"""What stands between the ledger and DeepSpeed, beside an engine that keeps DeepSpeed's words; refusals before weights.

The engine itself runs in tests/faults/test_zero.py, where DeepSpeed is installed.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from faults.tiny_run import recipe_for
from selectkd.config import recipe_from
from selectkd.errors import ConfigError, IntegrityError
from selectkd.models.gathered import gathered
from selectkd.teachers.live import LiveTeacher
from selectkd.training.checkpoint.encoding import whole
from selectkd.training.checkpoint.folder import read_part, write_part
from selectkd.training.checkpoint.parts import Weights
from selectkd.training.run import train
from selectkd.training.zero import (
    HeldStep,
    PartsOfRank,
    check_models,
    check_settings,
    configuration,
    configured,
)
from training.tiny import tiny_llama


class Engine:
    """DeepSpeedEngine and its optimizer of stage 3, of one rank: two flat parts, a step left out where it must be."""

    device = torch.device("cpu")

    def __init__(self, sizes: tuple[int, ...] = (3, 2)) -> None:
        self.fp32_partitioned_groups_flat = [nn.Parameter(torch.linspace(1.0, 2.0, size)) for size in sizes]
        self.optimizer: Any = self
        self.inner = torch.optim.AdamW(
            [{"params": [flat], "weight_decay": 0.1 * i} for i, flat in enumerate(self.flats)], lr=0.1
        )
        self.averaged_gradients: dict[int, Any] = {}
        self.overflow, self.calls = False, []
        self.parts = SimpleNamespace(
            optimizer=self.inner, fp32_partitioned_groups_flat=self.fp32_partitioned_groups_flat
        )

    @property
    def flats(self) -> list[nn.Parameter]:
        return self.fp32_partitioned_groups_flat

    def set_gradient_accumulation_boundary(self, *, is_boundary: bool) -> None:
        self.calls.append(("boundary", is_boundary))

    def backward(self, loss: Tensor, *, scale_wrt_gas: bool) -> None:
        self.calls.append(("backward", scale_wrt_gas))

    def reduced(self, *values: float) -> None:
        """Gradients as they lie after the last backward pass of a step."""
        numbers = iter(values)
        self.averaged_gradients = {
            i: [torch.tensor([next(numbers)]) for _ in range(flat.numel())]
            for i, flat in enumerate(self.flats)
        }

    def step(self) -> None:
        self.calls.append(("step", True))
        flat = {i: torch.cat(group) for i, group in self.averaged_gradients.items()}
        self.overflow = not all(bool(each.isfinite().all()) for each in flat.values())
        self.averaged_gradients = dict.fromkeys(flat)
        if not self.overflow:
            for i, gradient in flat.items():
                self.flats[i].grad = gradient
            self.inner.step()

    def values(self) -> list[Tensor]:
        moments = [value for flat in self.flats for _, value in sorted(self.inner.state[flat].items())]
        return [each.detach().clone() for each in (*self.flats, *moments)]


@pytest.mark.parametrize("last", [True, False])
def test_a_backward_pass_takes_no_step_and_says_whether_it_is_the_last_of_one(last: bool) -> None:
    engine = Engine()
    HeldStep(engine).backward(torch.ones(()), sync_gradients=last, scale_wrt_gas=False)
    assert engine.calls == [("boundary", last), ("backward", False)]


def test_the_norm_is_of_all_parts_and_says_what_is_not_finite() -> None:
    engine = Engine()
    held = HeldStep(engine)
    engine.reduced(1.0, 2.0, 0.0, 2.0, 4.0)
    assert held.get_global_grad_norm() == 5.0
    for piece in held.pieces():
        assert piece.grad is not None
        piece.grad.mul_(2.0)  # as Ledger.settle does: the gradients themselves
    assert held.get_global_grad_norm() == 10.0
    engine.reduced(1.0, float("nan"), 0.0, 2.0, 4.0)
    assert held.get_global_grad_norm().isnan()


def test_a_step_left_out_moves_nothing_even_where_its_gradient_is_finite() -> None:
    """A loss that is not finite may have a gradient that is; the learning rate's schedule goes on."""
    engine = Engine()
    held = HeldStep(engine)
    engine.reduced(1.0, 2.0, 0.0, 2.0, 4.0)
    held.take()
    before = engine.values()
    engine.reduced(1.0, 2.0, 0.0, 2.0, 4.0)
    held.leave_out()
    assert all(torch.equal(now, then) for now, then in zip(engine.values(), before, strict=True))
    assert not held.pieces() and engine.overflow is False


def test_a_ranks_part_of_the_optimizer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Through the checkpoint's own files; a part that is cut another way is refused."""
    first, second = Engine(), Engine()
    first.reduced(1.0, 2.0, 0.0, 2.0, 4.0)
    first.step()
    first.inner.param_groups[0]["lr"] = 0.05
    write_part(tmp_path, "optimizer-0", PartsOfRank(first.parts).state_dict())
    PartsOfRank(second.parts).load_state_dict(read_part(tmp_path, "optimizer-0"))
    for engine in (first, second):
        engine.reduced(-1.0, 1.0, 3.0, 0.5, 0.0)
        engine.step()
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    assert second.inner.param_groups[0]["lr"] == 0.05
    with pytest.raises(IntegrityError, match="the configuration of DeepSpeed that the run began with"):
        PartsOfRank(Engine((4, 1)).parts).load_state_dict(read_part(tmp_path, "optimizer-0"))


def test_weights_in_parts_are_put_together_to_be_saved_and_taken_apart_where_they_are_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(2, 2, bias=False)
    full = model.weight.detach().clone()

    class Gathered:
        def __init__(self, parameters: Any, modifier_rank: int | None = None) -> None:
            (self.parameter,), self.kept = parameters, modifier_rank is not None

        def __enter__(self) -> None:
            self.parameter.data = self.parameter.ds_tensor.clone()

        def __exit__(self, *_: Any) -> None:
            if self.kept:
                self.parameter.ds_tensor = self.parameter.data.clone()
            self.parameter.data = torch.empty(0)

    monkeypatch.setitem(
        sys.modules, "deepspeed", SimpleNamespace(zero=SimpleNamespace(GatheredParameters=Gathered))
    )
    model.weight.ds_tensor = full.clone()  # type: ignore[attr-defined]
    model.weight.data = torch.empty(0)
    assert torch.equal(whole(model.weight), full) and model.weight.numel() == 0
    Weights(model).load_state_dict({"weight": 2 * full})
    assert model.weight.numel() == 0 and torch.equal(whole(model.weight), 2 * full)
    with pytest.raises(IntegrityError, match="of another student"):
        Weights(model).load_state_dict({"weight": torch.ones(3, 2)})


def test_nothing_is_gathered_without_deepspeed() -> None:
    with gathered([torch.ones(2), torch.ones(3)]):
        assert "deepspeed" not in sys.modules or importlib.util.find_spec("deepspeed") is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "stage is 0"),
        ({"zero_optimization": {"stage": 1}}, "stage is 1"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, "offload_param is 'nvme'"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer is 'cpu'"),
        ({"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}, "bf16 is on"),
        ({"zero_optimization": {"stage": 3}, "optimizer": {"type": "AdamW"}}, "a section optimizer"),
        ({"zero_optimization": {"stage": 3}, "scheduler": {}}, "a section scheduler"),
        ({"zero_optimization": {"stage": 3}, "tensor_parallel": {"autotp_size": 2}}, "tensor_parallel is set"),
    ],
)  # fmt: skip
def test_what_deepspeed_cannot_do_here_is_refused_by_its_name(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_settings(settings)


@contextmanager
def started_for_deepspeed(monkeypatch: pytest.MonkeyPatch, stage: int = 3, **more: str) -> Any:
    found = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        patch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", str(stage))
        for name, value in more.items():
            patch.setenv(name, value)
        patch.setattr(
            importlib.util,
            "find_spec",
            lambda name, *rest: object() if name == "deepspeed" else found(name, *rest),
        )
        yield patch


def recipe_in(folder: Path, *, data: dict[str, Any] | None = None, **training: Any) -> Any:
    """A recipe whose models are not there."""
    recipe = recipe_for(folder / "nowhere", folder / "run", **{"engine": "trainer", **training})
    values = recipe.model_dump(mode="json", exclude_none=True)
    return recipe_from({**values, "data": {**values["data"], **(data or {})}})


def test_a_recipe_deepspeed_cannot_run_is_refused_before_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = {"policy": {"name": "student", "probability": 1.0}}
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 7}), "utf-8")
    clipped = {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    offloaded = {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    for more, changes, words in (
        ({}, {"engine": "loop"}, "training.engine = loop knows no DeepSpeed"),
        ({}, {"lora": True}, "training.lora and DeepSpeed"),
        ({}, {"data": student}, "has the student write"),
        (clipped, {}, "gradient_clipping is 7 and training.max_grad_norm is 1.0"),
        (offloaded, {}, "offload_optimizer is 'cpu'"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "bf16 is on"),
        ({"ACCELERATE_DEEPSPEED_CONFIG_FILE": "nowhere.json"}, {}, "cannot be read"),
    ):
        with started_for_deepspeed(monkeypatch, **more), pytest.raises(ConfigError, match=words):
            train(recipe_in(tmp_path, **changes))
        assert not (tmp_path / "run").exists()
    with started_for_deepspeed(monkeypatch) as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *_: None)
        with pytest.raises(ConfigError, match="which is not installed"):
            train(recipe_in(tmp_path))


def test_deepspeed_gets_the_recipes_own_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = recipe_in(tmp_path, max_grad_norm=0.5).training
    with configured(training) as nothing:
        assert nothing is None
    with started_for_deepspeed(monkeypatch, stage=2):
        found = configuration(training)
        with configured(training) as said:
            assert said == found
    assert found["zero_optimization"] == {"stage": 2} and found["gradient_clipping"] == 0.5
    assert found["gradient_accumulation_steps"] == training.gradient_accumulation


def test_models_that_cannot_train_in_parts_are_refused() -> None:
    student, teacher = tiny_llama(2), LiveTeacher(tiny_llama(1))
    check_models(student, teacher)
    with pytest.raises(ConfigError, match="weights in bfloat16"):
        check_models(tiny_llama(2).bfloat16(), teacher)
    student.get_output_embeddings().weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="frozen weights"):
        check_models(student, teacher)
    next(teacher.model.parameters()).ds_tensor = torch.ones(1)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="the teacher was taken apart by DeepSpeed as it was loaded"):
        check_models(tiny_llama(3), teacher)
