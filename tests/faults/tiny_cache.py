"""A small cache of a tiny teacher, built in this process or in one that will be killed."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from selectkd.models.load import Loaded, load_model
from selectkd.teachers.cache import ModelOrigin, build_cache, plan_of
from selectkd.teachers.cache.build import CacheOptions
from training.tiny import texts

EXAMPLES = texts(40)


def build(
    teacher: str, folder: Path, pause: float = 0.0, shard_rows: int = 6, options: CacheOptions | None = None
) -> None:
    """A cache of the tiny teacher, with 6 rows a shard in 40 shards of one sample; ``pause``: seconds after each."""
    torch.set_num_threads(1)
    loaded: Loaded = load_model(teacher)
    origin = ModelOrigin(loaded, model=teacher, dtype="float32")
    options = options or CacheOptions(shard_rows=shard_rows)
    plan, records = plan_of(origin, tokenizer=loaded.tokenizer, examples=EXAMPLES, options=options)
    build_cache(folder, plan, records, origin, say=lambda _: time.sleep(pause))
