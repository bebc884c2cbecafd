"""Perplexity on a file of text, and how far two models' differ. One sample is one unit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from selectkd.data.collate import collate
from selectkd.data.render import TextRules, pad_id_of
from selectkd.data.sources import dataset_source
from selectkd.data.supervised import supervised
from selectkd.evals.statistics import bootstrap_ratio, paired_bootstrap
from selectkd.models.forward import hidden_rows
from selectkd.models.head import head_of
from selectkd.models.load import Loaded
from selectkd.training.heldout.evaluation import negative_log_likelihood


@torch.no_grad()
def surprises(loaded: Loaded, path: Path, *, limit: int | None, max_length: int) -> list[tuple[float, int]]:
    """(-log q summed in nats, tokens) of each sample of a file, over the tokens a recipe would train on."""
    source = dataset_source({"path": str(path), "limit": limit}, loaded.tokenizer, TextRules(max_length))
    head = head_of(loaded.model)
    found = []
    for example in source.examples:
        batch = collate([example], pad_id=pad_id_of(loaded.tokenizer)).to(head.weight.device)
        rows = supervised(batch)
        if not len(rows):
            continue
        hidden = hidden_rows(loaded.model, batch, rows.position)  # [n, d]
        found.append((negative_log_likelihood(hidden, head, rows.labels), len(rows)))
    return found


def perplexity_row(
    model: str, path: Path, found: list[tuple[float, int]], settings: dict[str, Any]
) -> dict[str, Any]:
    """exp of the mean surprise a token, with its bootstrap over samples."""
    seen = bootstrap_ratio(*zip(*found, strict=True))
    return {
        "model": model, "task": path.stem, "metric": "perplexity", "value": math.exp(seen.value),
        "low": math.exp(seen.low), "high": math.exp(seen.high), "n": seen.n,
        "settings": {"data": str(path), "tokens": sum(n for _, n in found), **settings},
    }  # fmt: skip


def perplexity_compared(
    task: str, first: tuple[str, list[tuple[float, int]]], second: tuple[str, list[tuple[float, int]]]
) -> dict[str, Any]:
    """The difference of the samples' own mean surprises, second minus first, in nats a token. Same tokenizer only."""
    one, two = ([total / n for total, n in found] for _, found in (first, second))
    apart = paired_bootstrap(one, two)
    return {
        "task": task, "metric": "surprise", "first": first[0], "second": second[0], "difference": apart.value,
        "low": apart.low, "high": apart.high, "p_bootstrap": apart.p, "n": apart.n,
    }  # fmt: skip
