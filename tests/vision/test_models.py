"""For each family: hidden states through the whole model, and gradients into its parts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selectkd.data.collate import Batch, collate
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.supervised import supervised
from selectkd.data.text_cache import TextCache
from selectkd.loss.distillation import distillation_loss
from selectkd.models.forward import hidden_rows, last_hidden
from selectkd.models.head import head_of
from selectkd.models.load import load_model, load_vision
from selectkd.models.vision import PART_NAMES, freeze, parts_of
from selectkd.objective.objective import Objective
from selectkd.teachers.live import LiveTeacher
from vision import tiny


class Pair:
    """A tiny model with its examples."""

    def __init__(self, family: str, folder: Path, data: Path, cache: Path) -> None:
        loaded = load_model(folder)
        self.model, self.tokenizer, self.vision = loaded.model, loaded.tokenizer, load_vision(folder)
        self.examples = dataset_source(
            {"path": str(data)},
            self.tokenizer,
            TextRules(900),
            vision=self.vision,
            cache=TextCache.at(cache, workers=1),
        ).examples

    def batch(self, *which: int, multiple: int = 1) -> Batch:
        return collate([self.examples[i] for i in which], pad_id=0, pad_to_multiple_of=multiple)


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def pair(request: Any, folder_of: Any, tmp_path_factory: Any) -> Pair:
    where = tmp_path_factory.mktemp("data")
    data = tiny.bare(where) if request.param == "paligemma" else tiny.data(where)
    return Pair(request.param, folder_of(request.param), data, where / "cache")


@torch.no_grad()
def test_head_on_hidden_states_is_the_models_logits(pair: Pair) -> None:
    for which in ((0,), (1, 2), tuple(range(len(pair.examples)))):
        batch = pair.batch(*which)
        theirs = pair.model(**batch.model_inputs(), use_cache=False).logits
        ours = head_of(pair.model).logits(last_hidden(pair.model, batch))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_a_sample_is_read_as_its_own_processor_lays_it_out(pair: Pair) -> None:
    example = pair.examples[0]
    assert example.images is not None
    image = tiny.picture(0)
    text = pair.tokenizer.decode(example.input_ids)
    trained = [i for i, one in enumerate(example.completion) if one]
    if pair.tokenizer.chat_template is None:
        asked = pair.vision.processor(images=[image], text="<image>what is it", suffix="a cat")
        asked = {
            name: torch.as_tensor(np.asarray(value)) for name, value in asked.items() if name != "labels"
        }
    else:
        messages = tiny.asks("what is it", "a cat", "x.png")["messages"]
        messages[0]["content"][0] = {"type": "image"}
        text = pair.tokenizer.apply_chat_template(messages, tokenize=False)
        asked = pair.vision.processor(
            images=[image], text=[text], return_tensors="pt", add_special_tokens=False
        )
    assert asked["input_ids"][0].tolist() == example.input_ids
    assert pair.tokenizer.decode([example.input_ids[i] for i in trained]) in ("a cat<|end|>", "a cat</s>")
    theirs = pair.model(**asked, use_cache=False).logits[0]
    batch = pair.batch(0)
    ours = head_of(pair.model).logits(last_hidden(pair.model, batch))[0]
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_padding_and_neighbours_change_nothing(pair: Pair) -> None:
    whole = pair.batch(*range(len(pair.examples)), multiple=64)
    together = last_hidden(pair.model, whole)
    for row in range(len(pair.examples)):
        alone = last_hidden(pair.model, pair.batch(row))[0]
        assert (together[row, : alone.shape[0]] - alone).abs().max() <= 2e-5 * alone.abs().max()


@torch.no_grad()
def test_other_pixels_change_every_trained_row(pair: Pair) -> None:
    batch = pair.batch(0)
    rows = hidden_rows(pair.model, batch, supervised(batch).position)
    shuffled = {name: v.flip(-1) if name == "pixel_values" else v for name, v in batch.extra.items()}
    other = hidden_rows(pair.model, replace(batch, extra=shuffled), supervised(batch).position)
    assert ((rows - other).abs().amax(-1) > 1e-4).all()


def _loss(model: Any, teacher: Any, batch: Batch) -> torch.Tensor:
    chosen = supervised(batch)
    hidden = hidden_rows(model, batch, chosen.position)
    rows = teacher(batch, chosen.position)
    return distillation_loss(hidden, head_of(model), rows, Objective("forward_kl", "greedy_topk"))[0]


def test_gradients_reach_what_is_trained_alone(pair: Pair) -> None:
    batch = pair.batch(*range(len(pair.examples)))
    student = copy.deepcopy(pair.model)
    teacher = LiveTeacher(copy.deepcopy(pair.model))
    assert float(_loss(student, teacher, batch).detach()) == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
    assert set(parts_of(student)) == set(PART_NAMES)
    for frozen in ([], ["vision_tower", "projector"], ["language_model"]):
        student.requires_grad_(True)
        student.zero_grad(set_to_none=True)
        freeze(student, frozen)
        _loss(student, teacher, batch).backward()
        for name, modules in parts_of(student).items():
            moved = [p.grad is not None and bool(p.grad.any()) for m in modules for p in m.parameters()]
            assert any(moved) is (name not in frozen), name
