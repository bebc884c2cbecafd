"""FSDP2 as a recipe or ``accelerate launch --use_fsdp`` asks for it; what cannot be is refused before weights load."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from selectkd.config import ModelTeacher
from selectkd.config.sharding import Sharding
from selectkd.errors import ConfigError
from selectkd.models.load import PACKAGED, load_shape
from selectkd.models.sharded import Spread, check_transformers, parts_of
from selectkd.teachers.placement import PLACEMENT

_ENVIRONMENT = "ACCELERATE_USE_FSDP"
_KEY = "training.sharding"


def ranks_meet(device: torch.device) -> None:
    """The processes that torchrun or accelerate started together become ranks; nothing in one process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        PartialState(cpu=device.type == "cpu")


def check_sharding(recipe: Any, device: torch.device) -> str | None:
    """What of a recipe is sharded and over how many ranks, None where nothing is; ConfigError for what cannot be.

    Reads configurations, no weights.
    """
    training, parts = recipe.training, []
    wanted: list[tuple[str, Any, Any]] = []
    if training.sharding is not None:
        student = recipe.student
        named = (student.model, student.revision) if student.model is not None else _cut_from(recipe)
        wanted.append((_KEY, *named))
    wanted += [
        (PLACEMENT, teacher.model, teacher.revision)
        for teacher in recipe.teachers
        if isinstance(teacher, ModelTeacher) and teacher.placement == "sharded"
    ]
    if wanted:
        check_transformers()
    there = torch.accelerator.current_accelerator() if wanted else None
    if there is not None and there.type != device.type:
        raise ConfigError(
            f"{wanted[0][0]} spreads a model over this machine's accelerators ({there.type}), and the run is on "
            f"{device.type}. Leave --device out."
        )
    for key, model, revision in wanted:
        spread = Spread.of(training.sharding, key)
        if model is not None and model != PACKAGED and Path(model).suffix.lower() != ".gguf":
            parts_of(spread, load_shape(model, revision=revision))
        parts.append(f"{key}: over {spread.fsdp} ranks, {spread.replicate} times")
    return "; ".join(parts) or None


def _cut_from(recipe: Any) -> tuple[Any, Any]:
    """The model that a student is cut from, and its revision; None where the recipe does not say."""
    first = dict(recipe.teachers[0])
    return first.get("model"), first.get("revision")


@contextmanager
def as_launched(recipe: Any) -> Iterator[Any]:
    """The recipe with ``training.sharding`` where the process was started with ``accelerate launch --use_fsdp``.

    One way to shard is then tried: accelerate itself hears nothing of FSDP while the context lasts. ConfigError for
    settings of accelerate that are another thing than this key, DeepSpeed among them.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise ConfigError(
            "the run was started by accelerate with --use_deepspeed, and selectkd shards a student by FSDP2. Start it "
            f"with torchrun or `accelerate launch --use_fsdp --fsdp_version 2`, or set {_KEY}: {{}}."
        )
    if os.environ.get(_ENVIRONMENT, "false").lower() != "true":
        yield recipe
        return
    for name, wrong, remedy in (
        ("FSDP_VERSION", lambda value: value != "2", "FSDP 1 is not supported. Start with --fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", _true, "weights in main memory are not. Leave --fsdp_offload_params out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", _true, "the recipe says it: training.gradient_checkpointing: true"),
        (
            "ACCELERATE_USE_PARALLELISM_CONFIG",
            _true,
            f"the recipe says it: {_KEY}: {{fsdp: N, replicate: M}}",
        ),
    ):
        value = os.environ.get(name, "1" if name == "FSDP_VERSION" else "false")
        if wrong(value):
            raise ConfigError(f"the run was started by accelerate with {name} = {value}: {remedy}.")
    if recipe.training.sharding is None:
        training = recipe.training.model_copy(update={"sharding": Sharding()})
        recipe = recipe.model_copy(update={"training": training})
    os.environ[_ENVIRONMENT] = "false"
    try:
        yield recipe
    finally:
        os.environ[_ENVIRONMENT] = "true"


def _true(value: str) -> bool:
    return value.lower() in ("true", "1")
