"""DeepSpeed's ZeRO through accelerate: the optimizer (stage 2) and the weights (stage 3) in parts over the ranks.

accelerate has DeepSpeed take the optimizer step within the backward pass. ``HeldStep`` stands in its place and holds
the step back until the ledger has seen it. What DeepSpeed keeps of the parts is read by four names of its optimizers:
``averaged_gradients``, ``overflow``, and the flat fp32 weights of each stage.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError, IntegrityError
from selectkd.models.gathered import head_parameters, in_parts
from selectkd.models.head import head_of
from selectkd.training.counts import summed

STAGES = (2, 3)
_ENVIRONMENT = "ACCELERATE_USE_DEEPSPEED"


def asked_for() -> bool:
    """Whether the process was started for DeepSpeed, as ``accelerate launch --use_deepspeed`` does."""
    return os.environ.get(_ENVIRONMENT, "false").lower() == "true"


def settings() -> dict[str, Any]:
    """The DeepSpeed configuration of this process: accelerate's file, or its stage and offloading alone.

    ConfigError where the file cannot be read.
    """
    named = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named != "none":
        try:
            found = json.loads(Path(named).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"DeepSpeed's configuration {named} cannot be read: {error}. Name a JSON file that DeepSpeed takes."
            ) from error
    else:
        zero: dict[str, Any] = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))}
        for what in ("optimizer", "param"):
            device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what.upper()}_DEVICE", "none")
            if device != "none":
                zero[f"offload_{what}"] = {"device": device}
        found = {"zero_optimization": zero}
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return found if precision == "no" else {**found, precision: {"enabled": True}}


def check_settings(found: Mapping[str, Any]) -> None:
    """ConfigError for what a run under DeepSpeed cannot have, or what was never seen to train as replicas do."""
    zero = found.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in STAGES:
        raise ConfigError(
            f"DeepSpeed's zero_optimization.stage is {stage}; a run takes 2 or 3. Set it to 3 where memory is "
            "short, or start the run with torchrun (DDP)."
        )
    for what in ("offload_optimizer", "offload_param"):
        device = (zero.get(what) or {}).get("device", "none")
        if device != "none":
            raise ConfigError(
                f"DeepSpeed's {what} is {device!r}: the guard reads gradients that offloading keeps elsewhere. "
                f"Leave {what} out."
            )
    for name in ("fp16", "bf16", "amp", "torch_autocast"):
        if (found.get(name) or {}).get("enabled") is True:
            raise ConfigError(
                f"DeepSpeed's {name} is on, and under DeepSpeed a student trains in float32. Turn {name} off, or "
                "start the run with torchrun (DDP), where a student trains in the dtype it is loaded in."
            )
    for name, instead in (("optimizer", "adamw_torch is the run's"), ("scheduler", "training.schedule is")):
        if name in found:
            raise ConfigError(
                f"DeepSpeed's configuration has a section {name}; {instead}. Leave the section out."
            )
    for name in ("tensor_parallel", "sequence_parallel_size", "pipeline", "zenflow"):
        if found.get(name) or zero.get(name):
            raise ConfigError(
                f"DeepSpeed's {name} is set, which the loss was never tried with. Leave it out."
            )


def check_recipe(recipe: Any) -> None:
    """ConfigError where a recipe under DeepSpeed is one it was not made for. Reads no weights."""
    if not asked_for():
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"the run was started for DeepSpeed, which is not installed. Get it by `{how_to_install('deepspeed')}`, "
            "or start the run with torchrun (DDP)."
        )
    training = recipe.training
    if training.engine == "loop":
        raise ConfigError(
            "training.engine = loop knows no DeepSpeed, and the run was started for it. Set training.engine to "
            "trainer, or start the run with torchrun (DDP)."
        )
    if training.precision not in ("auto", "fp32", "tf32") or training.optimizer != "adamw":
        raise ConfigError(
            f"training.precision = {training.precision} and training.optimizer = {training.optimizer}: under DeepSpeed "
            "a student trains in float32 by adamw. Use precision: auto, fp32 or tf32, or start the run with torchrun "
            "(DDP)."
        )
    if training.activation_offload:
        raise ConfigError(
            "training.activation_offload and DeepSpeed were never tried together. Set it to false, or start the run "
            "with torchrun (DDP)."
        )
    if training.lora is not None:
        raise ConfigError(
            "training.lora and DeepSpeed do not go together: an adapter's optimizer is small enough for each rank. "
            "Start the run with torchrun (DDP)."
        )
    stage = configuration(training)["zero_optimization"]["stage"]
    writing = [each.name for each in recipe.data.policies if each.name not in ("dataset", "teacher")]
    if stage == 3 and writing:
        raise ConfigError(
            f"data.policy {writing[0]} has the student write, each rank as long as its own texts are, and under "
            "DeepSpeed's stage 3 a forward pass is one of all ranks. Set zero_optimization.stage to 2."
        )
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of a run before in this process; models would be taken apart as they load


def configuration(training: Any) -> dict[str, Any]:
    """What TrainingArguments(deepspeed=...) gets of a recipe's training section; ConfigError where they disagree."""
    found = settings()
    check_settings(found)
    for key, name, value in (
        ("train_micro_batch_size_per_gpu", "batch_size", training.batch_size),
        ("gradient_accumulation_steps", "gradient_accumulation", training.gradient_accumulation),
        ("gradient_clipping", "max_grad_norm", training.max_grad_norm),
    ):
        if found.get(key, "auto") not in ("auto", value):
            raise ConfigError(
                f"DeepSpeed's {key} is {found[key]} and training.{name} is {value}. Set {key} to auto."
            )
        found[key] = value
    found.pop("train_batch_size", None)
    return found


@contextmanager
def configured(training: Any) -> Iterator[dict[str, Any] | None]:
    """``configuration`` for TrainingArguments made in this context, None without DeepSpeed.

    transformers takes the word for DeepSpeed out of the environment as it reads it; the process stays started for it.
    """
    if not asked_for():
        yield None
        return
    try:
        yield configuration(training)
    finally:
        os.environ[_ENVIRONMENT] = "true"


def check_models(student: nn.Module, teacher: Any) -> None:
    """ConfigError where the models cannot train in parts: another dtype, or taken apart as they were loaded."""
    kinds = sorted({str(p.dtype).removeprefix("torch.") for p in student.parameters()} - {"float32"})
    if kinds:
        raise ConfigError(
            f"the student has weights in {', '.join(kinds)}, and under DeepSpeed a student trains in float32. "
            "Set student.dtype to float32, or start the run with torchrun (DDP)."
        )
    if any(not p.requires_grad for p in student.parameters()):
        raise ConfigError(
            "the student has frozen weights (an adapter's base), and under DeepSpeed all of a student's weights "
            "train. Start the run with torchrun (DDP)."
        )
    live = getattr(teacher, "model", None)
    for name, model in (("student", student), ("teacher", live)):
        if isinstance(model, nn.Module) and any(in_parts(p) for p in model.parameters()):
            raise ConfigError(
                f"the {name} was taken apart by DeepSpeed as it was loaded. Load the models before "
                "TrainingArguments(deepspeed=...) exists."
            )


@dataclass
class Piece:
    """This rank's part of a gradient, where ``Ledger.settle`` looks for it."""

    grad: Tensor | None


class HeldStep:
    """Stands where accelerate keeps its wrapper of the engine: backward passes without the step that follows them.

    engine: the DeepSpeedEngine. After the last backward pass of a step its gradients are reduced and lie in parts over
    the ranks (``pieces``); ``take`` or ``leave_out`` ends the step.
    """

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def backward(self, loss: Tensor, sync_gradients: bool = True, **options: Any) -> None:
        """As accelerate's, which would take the optimizer step here."""
        self.engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        self.engine.backward(loss, **options)

    def pieces(self) -> list[Piece]:
        """This rank's part of the step's gradient, averaged over ranks."""
        return [Piece(grad) for grad in self._gradients()]

    def _gradients(self) -> list[Tensor]:
        groups = self.engine.optimizer.averaged_gradients.values()
        return [grad for group in groups for grad in group or () if grad is not None]

    @torch.no_grad()
    def get_global_grad_norm(self) -> Tensor:
        """The norm of the whole gradient before clipping, NaN or infinite where it is; a collective call."""
        squares = [grad.double().square().sum() for grad in self._gradients()]
        mine = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)
        return summed(mine.to(self.engine.device)).sqrt()

    def take(self) -> None:
        """Clips and takes the step; the gradients are gone afterwards."""
        self.engine.step()

    @torch.no_grad()
    def leave_out(self) -> None:
        """Ends the step with parameters and optimizer as they were, on all ranks.

        DeepSpeed leaves out a step whose gradient is not finite, and clears what it keeps of it; so the gradient
        becomes that, the loss alone having been so perhaps.
        """
        for grad in self._gradients():
            grad.fill_(torch.nan)
        self.engine.step()
        self.engine.optimizer.overflow = False  # the learning rate goes on by a step all the same


class PartsOfRank:
    """This rank's part of the optimizer as a part of a checkpoint: fp32 weights, moments, and the groups' settings."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    @property
    def _flat(self) -> list[Tensor]:
        found = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)
        return list(self.optimizer.single_partition_of_fp32_groups if found is None else found)

    def state_dict(self) -> dict[str, Any]:
        """By reference: only the end of a step changes it."""
        inner = self.optimizer.optimizer
        return {
            "weights": self._flat,
            "moments": [dict(inner.state.get(flat, {})) for flat in self._flat],
            "groups": [{k: v for k, v in group.items() if k != "params"} for group in inner.param_groups],
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises IntegrityError where the parts are cut another way: another stage, or other bucket sizes."""
        inner, flats = self.optimizer.optimizer, self._flat
        mine = [tuple(flat.shape) for flat in flats]
        saved = [tuple(flat.shape) for flat in state["weights"]]
        if mine != saved:
            raise IntegrityError(
                f"DeepSpeed's parts have {saved} weights in the checkpoint and {mine} here. Go on with the "
                "configuration of DeepSpeed that the run began with."
            )
        for flat, weights, moments in zip(flats, state["weights"], state["moments"], strict=True):
            flat.data.copy_(weights)
            inner.state[flat] = {
                name: value.to(flat.device) if isinstance(value, Tensor) and value.ndim else value
                for name, value in moments.items()
            }
        for group, settings_of in zip(inner.param_groups, state["groups"], strict=True):
            group.update(settings_of)


def hold_step(trainer: Any) -> HeldStep:
    """Puts a ``HeldStep`` into a Trainer that DeepSpeed drives, and has the head whole where the loss is computed."""
    held = HeldStep(trainer.model_wrapped)
    trainer.accelerator.deepspeed_engine_wrapped = held
    outside = [p for p in head_parameters(head_of(trainer.distillation.student)) if in_parts(p)]
    if outside:
        import deepspeed  # type: ignore[import-not-found]

        for parameter in outside:
            deepspeed.zero.register_external_parameter(trainer.distillation, parameter)
    return held
