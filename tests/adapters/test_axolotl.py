"""axolotl's plugin: its section, its trainer and the columns of a teacher's best tokens."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from pydantic import ValidationError
from transformers import Trainer, TrainingArguments

from adapters.hf_programs import InOrder, arguments, collated, columns
from adapters.test_hf import plain_step, trained_step
from selectkd import CachedRows, Objective
from selectkd.adapters.axolotl import IDS, LOGP, Arguments, Settings, trainer_of
from selectkd.errors import ConfigError
from training.tiny import padded, texts, tiny_llama, tiny_tokenizer

K = 24


@pytest.fixture
def plugin(monkeypatch: Any) -> Any:
    """The plugin on axolotl's own base class where it is installed, else on one of its published methods."""
    if importlib.util.find_spec("axolotl") is None:
        base = types.ModuleType("axolotl.integrations.base")
        nothing = lambda self, *given, **named: None  # noqa: E731
        methods = (
            "register",
            "get_input_args",
            "get_training_args",
            "get_trainer_cls",
            "post_trainer_create",
        )
        vars(base)["BasePlugin"] = type("BasePlugin", (), dict.fromkeys(methods, nothing))
        for name in ("axolotl", "axolotl.integrations"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, base.__name__, base)
    trainers = types.ModuleType("axolotl.core.trainers")
    vars(trainers)["AxolotlTrainer"] = InOrder
    monkeypatch.setitem(sys.modules, "axolotl.core", types.ModuleType("axolotl.core"))
    monkeypatch.setitem(sys.modules, trainers.__name__, trainers)
    from selectkd.adapters.axolotl import _plugin

    _plugin.cache_clear()
    yield _plugin()()
    _plugin.cache_clear()


def with_teacher(examples: list[Any], teacher: Any) -> list[dict[str, Any]]:
    """The columns of a data set with the teacher's best tokens: those at a token are what it was drawn from."""
    rows = columns(examples)
    for row in rows:
        with torch.no_grad():
            best = teacher(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1).topk(K)
        blank = [list(range(K))], [[-torch.inf] * K]
        row[IDS], row[LOGP] = blank[0] + best.indices[:-1].tolist(), blank[1] + best.values[:-1].tolist()
    return rows


def collated_with_columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collated(
        [{name: row[name] for name in ("input_ids", "attention_mask", "labels")} for row in rows]
    )
    width = batch["input_ids"].shape[1]
    for name, fill in ((IDS, 0), (LOGP, -torch.inf)):
        batch[name] = torch.tensor([row[name] + [[fill] * K] * (width - len(row[name])) for row in rows])
    return batch


class FromColumns:
    """The same rows for our own engine."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def __call__(self, batch: Any, position: Any) -> CachedRows:
        with torch.no_grad():
            logits = self.teacher(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        best = logits.log_softmax(-1).flatten(0, 1)[position].topk(K)
        return CachedRows(best.indices, best.values)


def begun(trainer_class: Any, folder: Path, rows: Any, collate: Any) -> Any:
    args = TrainingArguments(**arguments(folder, per_device_train_batch_size=6))
    return trainer_class(
        model=tiny_llama(2), args=args, train_dataset=Dataset.from_list(rows), data_collator=collate,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip


def test_the_section_names_the_trainer_and_without_it_axolotl_keeps_its_own(plugin: Any) -> None:
    assert plugin.get_input_args() == "selectkd.adapters.axolotl.Arguments"
    cfg = types.SimpleNamespace(selectkd=None)
    assert plugin.get_trainer_cls(cfg) is None
    cfg.selectkd = {"teacher": "org/teacher", "beta": 0.1}
    assert issubclass(plugin.get_trainer_cls(cfg), InOrder)
    assert Arguments(selectkd=cfg.selectkd).selectkd == Settings(teacher="org/teacher", beta=0.1)
    with pytest.raises(ValidationError, match="verifer"):
        Arguments(selectkd={"verifer": "always"})


@pytest.mark.parametrize("kind", ["columns", "model"])
def test_its_trainer_has_our_gradient(kind: str, plugin: Any, tmp_path: Path) -> None:
    teacher, examples = tiny_llama(1).eval(), texts(6)
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    verifier = {"name": "greedy_topk", "k": 12}
    section = {"verifier": verifier, "beta": 0.1} | (
        {} if kind == "columns" else {"teacher": str(tmp_path / "teacher")}
    )
    trainer_class = plugin.get_trainer_cls(types.SimpleNamespace(selectkd=section))
    rows = with_teacher(examples, teacher) if kind == "columns" else columns(examples)
    trainer = begun(trainer_class, tmp_path, rows, collated_with_columns if kind == "columns" else collated)
    ours = trained_step(trainer)
    plain = plain_step(
        tiny_llama(2), teacher, Objective("forward_kl", verifier, 0.1), padded(examples, 6), "token_mean",
        rows=FromColumns(teacher) if kind == "columns" else None,
    )  # fmt: skip
    for name, gradient in plain.items():
        torch.testing.assert_close(
            ours[name], gradient, rtol=1e-4, atol=1e-6, msg=name
        )  # fp32, sums in another order
    assert ours.keys() == plain.keys()


def test_a_data_set_without_columns_is_refused_by_name(tmp_path: Path) -> None:
    trainer = begun(trainer_of(Trainer, Settings()), tmp_path, columns(texts(6)), collated)
    with pytest.raises(ConfigError, match="no columns target_token_ids"):
        trainer.train()
