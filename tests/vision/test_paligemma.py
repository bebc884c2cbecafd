"""Prompts of a model without a chat template that begins each with its images: as its own processor writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.text_cache import TextCache
from selectkd.models.load import load_tokenizer, load_vision
from vision import tiny

ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a prompt": ({"prompt": "caption en", "completion": "a cat"}, "caption en"),
    "a mark before it": ({"prompt": "<image>caption en", "completion": "a cat"}, "caption en"),
    "a mark in a line before it": ({"prompt": "<image>\ncaption en", "completion": "a cat"}, "caption en"),
    "a mark in a line behind it": ({"prompt": "caption en\n<image>", "completion": "a cat"}, "caption en"),
    "a mark within": ({"prompt": "what is <image> now", "completion": "a cat"}, "what is now"),
    "an instruction": ({"instruction": "answer en", "output": "a cat"}, "answer en"),
    "an instruction with its input": (
        {"instruction": "<image>answer en", "input": "which colour?", "output": "a cat"}, "answer en\n\nwhich colour?"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_prompt_is_all_of_its_text_without_marks(folder_of: Any, tmp_path: Path, name: str) -> None:
    folder = folder_of("paligemma")
    tokenizer, vision = load_tokenizer(folder), load_vision(folder)
    assert vision is not None
    tiny.data(tmp_path)
    record, prompt = ROWS[name]
    path = tiny.written(tmp_path, [{**record, "image": "0.png"}])
    cache = TextCache(tmp_path / "c", 1)
    source = dataset_source({"path": str(path)}, tokenizer, TextRules(200), vision=vision, cache=cache)
    (one,) = source.examples
    asked = vision.processor(text=prompt, images=[tiny.picture(0)], suffix="a cat")
    assert one.input_ids == asked["input_ids"][0]
    assert one.images is not None and len(one.images.places) == 1
