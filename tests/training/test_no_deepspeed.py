"""DeepSpeed is refused by name wherever somebody may ask for it, with the words of the way that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, TrainingArguments

from selectkd.config import recipe_from
from selectkd.errors import ConfigError
from selectkd.objective.objective import Objective
from selectkd.teachers import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.preflight.doctor import doctor
from selectkd.training.run import train
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer
from training.tiny import recipe_of


def test_a_recipe_with_the_old_key_names_the_one_that_shards(tmp_path: Path) -> None:
    content = recipe_of(
        tmp_path, training={"output_dir": "unused", "max_steps": 1, "deepspeed": {"stage": 2}}
    )
    with pytest.raises(ConfigError, match=r"training\.deepspeed.*Write training\.sharding"):
        recipe_from(content)


def test_a_run_started_for_deepspeed_is_refused_before_a_weight_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    training = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 1}
    recipe = recipe_from(recipe_of(tmp_path, training=training))
    with pytest.raises(
        ConfigError, match=r"--use_deepspeed.*--use_fsdp --fsdp_version 2.*training\.sharding"
    ):
        train(recipe, device="cpu")
    found = list(doctor(recipe, device="cpu"))
    assert [(one.check, one.ok) for one in found] == [("sharding", False)]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["deepspeed", "deepspeed_plugin"])
def test_a_trainer_refuses_arguments_for_deepspeed(
    name: str, student: Any, teacher_model: Any, tmp_path: Path
) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=1, use_cpu=True, report_to="none")
    setattr(args, name, {"zero_optimization": {"stage": 2}})
    with pytest.raises(ConfigError, match=r"DeepSpeed.*FSDP2.*--use_fsdp"):
        LedgerTrainer(
            DistillationModel(student, LiveTeacher(teacher_model)),
            BatchFeed(lambda _: []),
            Ledger(Objective()),
            args,
        )
