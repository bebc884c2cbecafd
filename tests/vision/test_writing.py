"""The student writes answers to prompts with images: from its cache as from a full pass over each text alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selectkd.config import load_recipe
from selectkd.data.collate import collate
from selectkd.data.render import TextRules
from selectkd.data.rewrite import last_turns, rebuilt
from selectkd.data.sources import dataset_source
from selectkd.data.text_cache import TextCache
from selectkd.models.load import load_model, load_vision
from selectkd.rollouts.batch_memory import Request
from selectkd.rollouts.generate import generate
from selectkd.rollouts.kv_decoder import CachedDecoder, RecomputingDecoder, kv_decoder
from selectkd.rollouts.replay import ReplayBuffer
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.training.checkpoint.encoding import join, split
from selectkd.training.run import train
from vision import tiny
from vision.conftest import Recipes
from vision.test_runs import ran


class Breaks:
    """A listener that breaks a run off, as an error would, when the line of a step is written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

    def line(self, line: dict[str, Any]) -> None:
        if line["step"] == self.step and "loss" in line:
            raise KeyboardInterrupt


@pytest.mark.parametrize("family", tiny.FAMILIES)
@torch.no_grad()
def test_a_token_from_the_cache_is_that_of_a_full_pass(folder_of: Any, tmp_path: Path, family: str) -> None:
    folder = folder_of(family)
    loaded, vision = load_model(folder), load_vision(folder)
    data = tiny.bare(tmp_path) if family == "paligemma" else tiny.data(tmp_path)
    examples = dataset_source(
        {"path": str(data)},
        loaded.tokenizer,
        TextRules(900),
        vision=vision,
        cache=TextCache(tmp_path / "c", 1),
    ).examples
    turns = last_turns(collate(list(examples), pad_id=0))
    prompts, images = [turn.prompt for turn in turns], [turn.images for turn in turns]
    options: dict[str, Any] = {"width": 300, "images": images}
    assert isinstance(kv_decoder(loaded.model, prompts, **options), CachedDecoder)
    whole, read = (kind(loaded.model, prompts, **options) for kind in (RecomputingDecoder, CachedDecoder))
    # the first text with its first answer token is the whole first sample, cut there
    first = turns[0]
    sample = replace(first, completion=[9]).example
    batch = collate([sample], pad_id=0, pad_to_multiple_of=1)
    theirs = loaded.model(**batch.model_inputs(), use_cache=False).logits[0, :, :300]
    close = {"rtol": 0, "atol": 2e-4 * float(theirs.abs().max())}
    torch.testing.assert_close(read.logits[0], theirs[-2], **close)
    token = torch.full((len(prompts),), 9)
    for step in range(3):
        if step == 1:
            rows = torch.tensor(range(1, len(prompts)))
            read.keep(rows)
            whole.keep(rows)
            token = token[1:]
        read.append(token)
        whole.append(token)
        torch.testing.assert_close(read.logits, whole.logits, **close)
        if step == 0:
            torch.testing.assert_close(read.logits[0], theirs[-1], **close)


def test_a_text_depends_on_its_image_and_not_on_its_batch(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("qwen2_5_vl")
    loaded, vision = load_model(folder), load_vision(folder)
    tiny.data(tmp_path)
    records = [tiny.asks("what is it", "a cat", path) for path in ("0.png", "3.png", "1.png")]
    path = tiny.written(tmp_path, records, "asked.jsonl")
    examples = dataset_source(
        {"path": str(path)},
        loaded.tokenizer,
        TextRules(900),
        vision=vision,
        cache=TextCache(tmp_path / "c", 1),
    ).examples
    requests = [
        Request(turn.prompt, 8, images=turn.images) for turn in last_turns(collate(list(examples), pad_id=0))
    ]
    rule, options = Draw(Sampling(1.0)), {"ends": [2], "width": 300, "seed": 3}
    together = generate([loaded.model], requests, rule, **options)
    assert [generate([loaded.model], [one], rule, **options)[0].ids for one in requests] == [
        t.ids for t in together
    ]
    assert len({tuple(text.ids) for text in together}) == 3


def test_a_run_on_the_students_own_answers_to_images(recipe: Recipes) -> None:
    policy = {"name": "student", "max_new_tokens": 6}
    losses, _ = ran(recipe(family="qwen2_5_vl", data={"policy": policy}))
    again, _ = ran(recipe("again", family="qwen2_5_vl", data={"policy": policy}))
    assert losses == again and all(0 < loss < 100 for loss in losses)


def test_a_run_on_replayed_answers_to_images_goes_on_to_the_same_weights(recipe: Recipes) -> None:
    policy = {"name": "student", "max_new_tokens": 4, "replay": 5}
    changes: dict[str, Any] = {
        "data": {"policy": policy},
        "training": {"max_steps": 4, "batch_size": 1, "save_every": 1},
    }
    _, whole = ran(recipe("whole", **changes))
    path = recipe("stops", **changes)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(path, []), progress=Breaks(3))
    _, again = ran(path)
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_replayed_text_shows_its_images_in_a_batch_that_has_none(folder_of: Any, tmp_path: Path) -> None:
    loaded, vision = load_model(folder_of("paligemma")), load_vision(folder_of("paligemma"))
    data = tiny.bare(tmp_path)
    cache = TextCache(tmp_path / "c", 1)
    examples = dataset_source(
        {"path": str(data)}, loaded.tokenizer, TextRules(900), vision=vision, cache=cache
    ).examples
    seen = next(one for one in examples if one.images is not None and one.images.refs)
    words = replace(seen, input_ids=[5, 6, 7, 8], completion=[False, False, True, True], images=None)
    bare = collate([words], pad_id=0)
    buffer = ReplayBuffer(2, vision=vision)
    buffer.add(last_turns(collate([seen], pad_id=0))[0])
    buffer.load_state_dict(join(split(buffer.state_dict(), {}), {}))
    batch = rebuilt(bare, [buffer.at(0.0).example, words], pad_id=0)
    expected = collate([seen], pad_id=0)
    assert torch.equal(batch.extra["pixel_values"], expected.extra["pixel_values"])
    assert batch.extra["token_type_ids"][1, :4].tolist() == [0, 0, 1, 1]
