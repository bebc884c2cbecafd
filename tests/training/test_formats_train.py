"""A file of one's own making in each data format trains."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from selectkd.cli.demo_pair import byte_tokenizer
from selectkd.config import recipe_from
from selectkd.training.run import train
from training.tiny import tiny_llama

CHATML = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TALK = [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5, I think"}]
RECORDS = {
    "messages": {"messages": TALK},
    "conversations": {
        "conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5, I think"}]
    },
    "prompt_completion": {"prompt": "2 + 3 =", "completion": " 5, I think"},
    "instruction": {"instruction": "Add.", "input": "2 and 3", "output": "5, I think"},
    "preference": {"prompt": "2 + 3 =", "chosen": " 5, I think", "rejected": " 6"},
    "text": {"text": "2 + 3 = 5, I think"},
    "tokens": {"input_ids": [10, 11, 12, 13, 14, 15], "labels": [-100, -100, 12, 13, 14, 15]},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    model = tiny_llama(0, layers=3)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 128
    model.config.bos_token_id = None
    model.config.eos_token_id = model.config.pad_token_id = tokenizer.eos_token_id
    model.generation_config.bos_token_id = None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", RECORDS)
def test_a_file_in_each_format_trains(name, teacher, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(RECORDS[name]) + "\n" for _ in range(6)), encoding="utf-8")
    recipe = recipe_from(
        {
            "teacher": {"model": str(teacher)},
            "student": {"from_teacher": {"layers": 2, "choose": [0, 2]}},
            "data": {"sources": [{"path": str(file)}]},
            "training": {
                "output_dir": str(tmp_path / "run"), "max_steps": 2, "batch_size": 2, "max_length": 96,
                "max_prompt_length": 48, "engine": "loop", "probe_samples": 0,
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
