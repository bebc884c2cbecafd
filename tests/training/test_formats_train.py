"""A file of one row of each shape that data sets of the hub have trains two steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from data.real_rows import ROWS
from data.template_zoo import tokenizer_of
from selectkd.config import recipe_from
from selectkd.training.run import train
from training.tiny import tiny_llama


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = tokenizer_of("qwen3")
    model = tiny_llama(0, layers=3)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 1024
    model.config.bos_token_id = None
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_each_shape_trains(name, teacher, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps(ROWS[name][0]) + "\n", encoding="utf-8")
    recipe = recipe_from(
        {
            "teacher": {"model": str(teacher)},
            "student": {"from_teacher": {"layers": 2, "choose": [0, 2]}},
            "data": {"sources": [{"path": str(file)}]},
            "training": {
                "output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 2, "max_length": 1024,
                "probe_samples": 0,
            },
        }
    )  # fmt: skip
    result = train(recipe)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert len(steps) == 2
    for line in steps:
        assert {"step", "loss", "kl", "tar", "bite", "lr", "tokens", "tokens_per_second", "skipped"} <= set(
            line
        )
        assert (
            math.isfinite(line["loss"]) and line["loss"] > 0 and line["tokens"] > 0 and line["skipped"] == 0
        )
