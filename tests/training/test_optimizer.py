"""training.optimizer and activation_offload: transformers' optimizers, activations in main memory."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selectkd.config import recipe_from
from selectkd.errors import ConfigError
from selectkd.loss import block_compiled
from selectkd.loss.options import LossOptions
from selectkd.models.head import backbone
from selectkd.models.precision import FP32, PRECISIONS
from selectkd.objective.objective import Objective
from selectkd.teachers import LiveTeacher
from selectkd.training.activations import activations_offloaded
from selectkd.training.arguments import training_arguments
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.optimizer import KINDS, trainers_name
from selectkd.training.run import train
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer
from training.tiny import padded, recipe_of, texts, tiny_llama, write_pair

WITH_PACKAGES = [name for name, kind in KINDS.items() if kind.package is not None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=4))
    return root


@pytest.fixture
def recipe(folders: Path, tmp_path: Path) -> Callable[..., Any]:
    def made(name: str, **training: Any) -> Any:
        settings = {
            "output_dir": str(tmp_path / name), "max_steps": 4, "batch_size": 3, "learning_rate": 1e-3,
            "max_length": 32, "max_prompt_length": 16, "probe_samples": 2,
        }  # fmt: skip
        return recipe_from(recipe_of(folders, training=settings | training))

    return made


class Ends(Exception):
    pass


class EndsAt:
    """A listener that ends the process's run once it hears of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stage(self, name: str, total: int | None = None) -> None: ...

    def line(self, line: dict[str, Any]) -> None:
        if line["step"] == self.step and "loss" in line:
            raise Ends


def left_by(result: Any) -> tuple[bytes, ...]:
    names = ("metrics.jsonl", "student/model.safetensors", "student/config.json")
    return tuple((result.run_dir / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    "chosen",
    [
        {"optimizer": "adafactor", "weight_decay": 0.1},
        {"optimizer": "sgd", "precision": "bf16"},
        {"optimizer": "adafactor", "precision": "bf16-pure"},
        {"betas": [0.8, 0.95], "eps": 1e-4, "weight_decay": 0.1, "precision": "bf16"},
    ],
)
def test_a_run_in_two_parts_leaves_the_same_bytes(recipe, chosen):
    whole = left_by(train(recipe("whole", **chosen)))
    apart = recipe("apart", save_every=1, **chosen)
    with pytest.raises(Ends):
        train(apart, progress=EndsAt(3))
    resumed = train(apart)
    assert resumed.resumed_from == 2 and left_by(resumed) == whole


def test_the_optimizers_settings_reach_it(recipe, student, teacher_model):
    training = recipe("unused", weight_decay=0.1, betas=[0.8, 0.95], eps=1e-4).training
    args = training_arguments(training, steps=1, precision=FP32, device=torch.device("cpu"))
    model = DistillationModel(student, LiveTeacher(teacher_model))
    trainer = LedgerTrainer(model, BatchFeed(lambda _: []), Ledger(Objective()), args)
    decayed, rest = trainer.create_optimizer().param_groups
    assert (decayed["betas"], decayed["eps"], decayed["weight_decay"]) == ((0.8, 0.95), 1e-4, 0.1)
    assert rest["weight_decay"] == 0.0 and all(p.ndim == 1 for p in rest["params"])


@pytest.mark.parametrize(("steps", "expected"), [(199, False), (200, "auto")])
def test_a_short_run_does_not_compile_its_loss(monkeypatch, recipe, student, teacher_model, steps, expected):
    monkeypatch.setattr(block_compiled, "can_compile", lambda: True)
    args = training_arguments(
        recipe("unused").training, steps=steps, precision=FP32, device=torch.device("cpu")
    )
    model = DistillationModel(student, LiveTeacher(teacher_model), options=LossOptions(compiled="auto"))
    LedgerTrainer(model, BatchFeed(lambda _: []), Ledger(Objective()), args)
    assert model.options.compiled == expected


def test_adamw_is_fused_on_a_gpu_and_plain_on_a_cpu():
    assert trainers_name("adamw", "cuda:1") == "adamw_torch_fused"
    assert trainers_name("adamw", "cpu") == "adamw_torch"


@pytest.mark.parametrize("name", WITH_PACKAGES)
def test_an_optimizer_whose_package_is_missing_is_refused_before_weights(name, recipe, monkeypatch):
    package = KINDS[name].package
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda asked: None if asked == package[0] else found(asked)
    )
    monkeypatch.setattr(
        "selectkd.training.assembly.load_model", lambda *_, **__: pytest.fail("weights were loaded")
    )
    with pytest.raises(ConfigError, match=f"pip install {package[1]}"):
        train(recipe("missing", optimizer=name))


def test_every_optimizer_is_one_that_transformers_knows():
    from transformers.training_args import OptimizerNames

    known = {name.value for name in OptimizerNames}
    assert {kind.name for kind in KINDS.values()} <= known


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        ({"optimizer": "adafactor", "betas": [0.9, 0.99]}, "adafactor has no betas"),
        ({"optimizer": "lion", "eps": 1e-6}, "lion has no eps"),
        ({"optimizer": "adamw8bit"}, "adamw_8bit"),
        ({"betas": [0.9]}, "two numbers"),
        ({"activation_offload": True, "gradient_checkpointing": True}, "one of the two"),
    ],
)
def test_settings_that_cannot_be_are_refused(recipe, chosen, told):
    with pytest.raises(ConfigError, match=told):
        recipe("refused", **chosen)


@pytest.mark.parametrize("precision", [FP32, PRECISIONS["bf16"]])
def test_offloaded_activations_give_the_same_gradients_and_leave_weights_where_they_are(
    precision, new_student, monkeypatch
):
    batch = padded(texts(3), 3)[0]
    copied: list[torch.Size] = []
    plain_copy = torch.Tensor.copy_

    def counted(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        copied.append(self.shape)
        return plain_copy(self, *given, **named)

    gradients = []
    for least in (None, 0):
        student = new_student()
        with precision.autocast("cpu"):
            if least is None:
                hidden = backbone(student)(**batch.model_inputs())
            else:
                monkeypatch.setattr(torch.Tensor, "copy_", counted)
                with activations_offloaded(student, least=least):
                    hidden = backbone(student)(**batch.model_inputs())
                monkeypatch.undo()
        hidden.float().square().sum().backward()
        gradients.append({name: p.grad for name, p in student.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
    weights = {tuple(p.shape) for p in student.parameters() if p.ndim == 2}
    assert len(copied) > 10 and not weights & {tuple(shape) for shape in copied}
    assert not weights & {tuple(reversed(shape)) for shape in copied if len(shape) == 2}


def test_a_run_with_offloaded_activations_is_the_same_run(recipe):
    assert left_by(train(recipe("offloaded", activation_offload=True))) == left_by(train(recipe("plain")))
