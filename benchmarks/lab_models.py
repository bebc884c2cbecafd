"""The laboratory's models: Llamas of .05 to 15 million parameters, trained on records from scratch or from a model.

A model's folder is whole or not there. While a model trains, its state stands beside the folder, and the same call goes
on from it to the same weights.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

LENGTH = 128
BATCH = 16
SAVE_SECONDS = 60.0
"""Between two states of a training."""

Relabel = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(input_ids [b, t], labels [b, t], generator) -> labels [b, t]: what a damaged teacher learns in place of the text."""


@dataclass(frozen=True)
class Size:
    """width d, layers, heads and inner width of a Llama with tied embeddings."""

    width: int
    layers: int
    heads: int
    inner: int


SIZES = {
    "0.05M": Size(32, 1, 2, 88),
    "0.2M": Size(64, 2, 4, 176),
    "0.5M": Size(96, 3, 4, 256),
    "1M": Size(128, 4, 4, 344),
    "3M": Size(224, 5, 7, 600),
    "7M": Size(320, 6, 8, 856),
    "15M": Size(448, 6, 8, 1200),
}
"""By about how many parameters each has at a vocabulary of 1,024."""


@dataclass(frozen=True)
class Course:
    """How a model trains: optimizer steps, highest learning rate, seed, the shares of the steps after which a copy is
    kept as a model of its own, and Adam's second decay. muon: its matrices by Muon, the rest by Adam, and products in
    bf16; a step of a wide model then takes twice the time and brings it further."""

    steps: int
    learning_rate: float
    seed: int = 0
    ages: tuple[float, ...] = ()
    beta2: float = 0.999
    muon: bool = False


def made(size: Size, tokenizer: Any, seed: int, *, copies: bool = False) -> Any:
    """A Llama of random weights. copies: from weights as large as 1 / sqrt(width) and with positions for short
    texts, so that it learns to copy numbers and letters in some thousand steps instead of not at all."""
    torch.manual_seed(seed)
    end = tokenizer.eos_token_id
    start: dict[str, Any] = {}
    if copies:
        start = {"initializer_range": size.width**-0.5,
                 "rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}  # fmt: skip
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.width, intermediate_size=size.inner,
        num_hidden_layers=size.layers, num_attention_heads=size.heads, num_key_value_heads=size.heads,
        max_position_embeddings=4 * LENGTH, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=end, pad_token_id=end, **start,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Row(NamedTuple):
    """The ids of a record; those before ``first`` are read and not learned."""

    ids: list[int]
    first: int = 0


def rows_of(
    tokenizer: Any, records: Sequence[dict[str, Any]], *, completions_only: bool = False
) -> list[Row]:
    """Every record with its end token, at most LENGTH ids of it."""
    texts = [one["prompt"] + one["completion"] for one in records]
    ids = tokenizer(texts)["input_ids"] if texts else []
    first = [0] * len(records)
    if completions_only:
        first = [len(one) for one in tokenizer([one["prompt"] for one in records])["input_ids"]]
    return [
        Row([*one, tokenizer.eos_token_id][:LENGTH], start) for one, start in zip(ids, first, strict=True)
    ]


def batches(rows: Sequence[Row], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(input_ids, labels), each [b, t], without end: every epoch in an order of its own, rows of like length together.
    A label of -100 is not learned."""
    epoch = 0
    while True:
        chance = random.Random(f"{seed} {epoch}")
        order = list(range(len(rows)))
        chance.shuffle(order)
        groups = []
        for start in range(0, len(order), 32 * BATCH):
            pool = sorted(order[start : start + 32 * BATCH], key=lambda i: len(rows[i].ids))
            groups += [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
        chance.shuffle(groups)
        for group in groups:
            yield padded([rows[i] for i in group])
        epoch += 1


def padded(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """(input_ids, labels) of rows, padded on the right."""
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows])
    labels = torch.tensor(
        [[-100] * row.first + row.ids[row.first :] + [-100] * (width - len(row.ids)) for row in rows]
    )
    return ids, labels


def token_losses(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """-log q of every label after the first of its row, [n], in nats."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), reduction="none", ignore_index=-100
    )
    return losses[labels[:, 1:].reshape(-1) != -100]


@torch.no_grad()
def heldout_loss(model: Any, rows: Sequence[Row]) -> float:
    """The mean loss of held-out rows in nats a token."""
    model.eval()
    ordered = sorted(rows, key=lambda row: len(row.ids))
    losses = torch.cat(
        [token_losses(model, *padded(ordered[i : i + 32])) for i in range(0, len(ordered), 32)]
    )
    model.train()
    return float(losses.mean())


def train(
    folder: Path,
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    heldout: Sequence[Row],
    course: Course,
    relabel: Relabel | None = None,
) -> None:
    """Trains the model on rows of ids and saves it in ``folder``; ``relabel`` changes the labels of every batch."""

    def loss(batch: tuple[Tensor, Tensor], step: int) -> tuple[Tensor, int]:
        ids, labels = batch
        if relabel is not None:
            labels = relabel(ids, labels, torch.Generator().manual_seed(course.seed * 1_000_003 + step))
        with torch.autocast("cpu", torch.bfloat16, enabled=course.muon):
            losses = token_losses(model, ids, labels)
        return losses.mean(), int((labels[:, 1:] != -100).sum())

    def save(part: Path) -> None:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)

    def source(start: int) -> Iterator[tuple[Tensor, Tensor]]:
        return islice(batches(rows, course.seed), start, None)

    follow(folder, model, course, Material(source, loss, lambda: heldout_loss(model, heldout), save))


@dataclass(frozen=True)
class Material:
    """What a course is about. batches: from a step on, without end; loss: (batch, step) -> (its mean loss, its tokens);
    heldout: the loss of held-out text; save: writes the model into a folder."""

    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[Any, int], tuple[Tensor, int]]
    heldout: Callable[[], float]
    save: Callable[[Path], None]


def follow(folder: Path, model: Any, course: Course, material: Material) -> None:
    """Trains the model and saves it in ``folder``, with its ages beside it and its course in curve.jsonl; does nothing
    where the folder is there. A training that was killed goes on from its state, beside the folder."""
    if folder.exists():
        return
    optimizers = _optimizers(model, course)
    paces = [
        get_cosine_schedule_with_warmup(one, max(1, course.steps // 10), course.steps) for one in optimizers
    ]
    state = folder.with_name(folder.name + ".state")
    curve, step, tokens, seconds = [], 0, 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for part, state_of in zip((*optimizers, *paces), saved["parts"], strict=True):
            part.load_state_dict(state_of)
        curve, step, tokens, seconds = (saved[name] for name in ("curve", "step", "tokens", "seconds"))
    source = material.batches(step)
    looks = {max(1, round(course.steps * part / 20)) for part in range(1, 21)}
    ages = {max(1, round(course.steps * share)): share for share in course.ages}
    began = saved_at = time.perf_counter()
    while step < course.steps:
        loss, count = material.loss(next(source), step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *paces):
            part.step()
        model.zero_grad(set_to_none=True)
        step, tokens = step + 1, tokens + count
        spent = seconds + time.perf_counter() - began
        if step in looks:
            curve.append({"step": step, "tokens": tokens, "seconds": round(spent, 1), "loss": float(loss.detach()),
                          "heldout": material.heldout()})  # fmt: skip
        if step in ages:
            _save(folder.with_name(f"{folder.name}-age-{round(100 * ages[step])}"), material, curve)
        if time.perf_counter() - saved_at > SAVE_SECONDS:
            saved_at = time.perf_counter()
            partial = state.with_suffix(".part")
            torch.save({"model": model.state_dict(), "parts": [one.state_dict() for one in (*optimizers, *paces)],
                        "curve": curve, "step": step, "tokens": tokens, "seconds": spent}, partial)  # fmt: skip
            partial.rename(state)
    _save(folder, material, curve)
    state.unlink(missing_ok=True)


def _optimizers(model: Any, course: Course) -> list[torch.optim.Optimizer]:
    rest, found = list(model.parameters()), []
    if course.muon:
        layers = list(model.model.layers.parameters())
        matrices = [one for one in layers if one.ndim == 2]
        found.append(torch.optim.Muon(matrices, lr=course.learning_rate, weight_decay=0.01,
                                      adjust_lr_fn="match_rms_adamw"))  # fmt: skip
        taken = {id(one) for one in matrices}
        rest = [one for one in rest if id(one) not in taken]
    found.append(
        torch.optim.AdamW(rest, lr=course.learning_rate, weight_decay=0.01, betas=(0.9, course.beta2))
    )
    return found


def _save(folder: Path, material: Material, curve: list[dict[str, Any]]) -> None:
    """The model's folder, whole or not there."""
    part = folder.with_name(folder.name + ".part")
    material.save(part)
    (part / "curve.jsonl").write_text("".join(json.dumps(look) + "\n" for look in curve), "utf-8")
    shutil.rmtree(folder, ignore_errors=True)  # a younger teacher of a training that was begun anew
    part.rename(folder)


def noisy_tokens(rows: Sequence[Row], share: float, seed: int) -> list[int]:
    """Token ids such that ``share`` of all learned positions come right after one of them that is learned as well, to
    about a hundredth."""
    counts: dict[int, int] = {}
    for row in rows:
        for token in row.ids[row.first : -1]:
            counts[token] = counts.get(token, 0) + 1
    total, taken, chosen = sum(len(row.ids) - max(row.first, 1) for row in rows), 0, []
    order = sorted(counts)
    random.Random(seed).shuffle(order)
    for token in order:
        if taken + counts[token] <= share * total:
            chosen.append(token)
            taken += counts[token]
    return sorted(chosen)


def wrong_after(tokens: Sequence[int], vocabulary: int, *, sure: bool, seed: int) -> Relabel:
    """Labels right after one of ``tokens`` in learned text are wrong: always the same other token for each where
    ``sure``, so that a teacher learns to be wrong with confidence; else one drawn anew each time, so that it learns to
    be unsure."""
    noisy = torch.zeros(vocabulary, dtype=torch.bool)
    noisy[list(tokens)] = True
    other = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed))
    other = torch.where(other == torch.arange(vocabulary), (other + 1) % vocabulary, other)

    def relabel(ids: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        after = torch.zeros_like(noisy[ids])
        after[:, 1:] = noisy[ids[:, :-1]] & (labels[:, :-1] != -100)
        after &= labels != -100
        drawn = torch.randint(vocabulary, labels.shape, generator=generator)
        return torch.where(after, other[labels.clamp(min=0)] if sure else drawn, labels)

    return relabel
