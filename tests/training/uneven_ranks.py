"""Runs on one of two ranks (gloo) whose micro-batches do not all reach every parameter; writes their last weights.

torchrun --nproc-per-node 2 uneven_ranks.py FOLDER
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed as dist
from torch import nn
from transformers import TrainingArguments

from selectkd.data.example import Example
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.text_cache import TextCache
from selectkd.data.vision import Vision
from selectkd.loss.plan import StreamSpec
from selectkd.models.sharded import CAN_SHARD, Spread, shard, whole
from selectkd.models.vision import settings_of
from selectkd.objective.objective import Objective
from selectkd.teachers import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer
from training.tiny import padded, texts, tiny_llama
from vision import tiny as vision

STEPS, RATE, MARK = 4, 1e-2, 63
FAMILY = "internvl"
CASES = (
    ("weightless", "ddp"),
    ("weightless_last", "ddp"),
    ("one_expert", "ddp"),
    ("text_alone", "ddp"),
    *([("weightless", "fsdp")] if CAN_SHARD else []),
)
"""What the batches of a rank do not reach, and how the student is spread over the ranks. text_alone: rank 1 meets no
image, and the vision tower trains."""


class SometimesUsed(nn.Module):
    """A vector added to the hidden states of a batch that holds the token MARK; no other batch reaches it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1, 1, width))

    def forward(self, decoder: Any, inputs: Any, given: dict[str, Any], output: Any) -> Any:
        if bool((given["input_ids"] == MARK).any()):
            output.last_hidden_state = output.last_hidden_state + self.shift
        return output


def model_of(case: str, seed: int) -> Any:
    """A tiny model; in the case text_alone one that sees images."""
    if case != "text_alone":
        return tiny_llama(seed)
    return vision.model_of(vision.config_of(FAMILY, vision.tokenizer_of(FAMILY)), seed)


def student_of(case: str) -> Any:
    """A student with a head of its own; in the case one_expert with a vector that few batches reach."""
    if case == "text_alone":
        return model_of(case, 2)
    student = tiny_llama(2)
    student.config.tie_word_embeddings = False
    student.lm_head.weight = nn.Parameter(student.lm_head.weight.detach().flip(0))
    if case == "one_expert":
        student.sometimes = SometimesUsed(student.config.hidden_size)
        student.model.register_forward_hook(student.sometimes, with_kwargs=True)
    return student


def images_and_text(folder: Path) -> Callable[[int], list[Any]]:
    """Of four batches, two a rank, those of rank 1 have no image."""
    tokenizer = vision.tokenizer_of(FAMILY)
    processor = vision.processor_of(FAMILY, tokenizer)
    reader = Vision(processor, settings_of(processor))
    path = vision.data(folder / f"records-{os.environ.get('RANK')}")
    cache = TextCache.at(folder / f"text-{os.environ.get('RANK')}")
    read = dataset_source({"path": str(path)}, tokenizer, TextRules(400), cache=cache, vision=reader).examples
    seen, unseen = (
        [one for one in read if bool(one.images and one.images.refs) == images] for images in (True, False)
    )
    examples = [replace((seen, unseen)[i % 2][i // 2 % 2], stream=0) for i in range(16)]
    return lambda epoch: padded(examples, 1)


def micro_of(case: str, folder: Path) -> Callable[[int], list[Any]]:
    """Of four batches, two a rank, the last, or with weightless_last the last of both ranks, reaches less."""
    if case == "text_alone":
        return images_and_text(folder)
    examples: list[Example] = []
    for index, example in enumerate(texts(16, streams=1)):
        less = index % 4 in ((2, 3) if case == "weightless_last" else (3,))
        ids = [3 if token == MARK else token for token in example.input_ids]
        if case == "one_expert":
            ids[0] = 3 if less else MARK
        examples.append(replace(example, input_ids=ids, stream=int(less and case != "one_expert")))
    return lambda epoch: padded(examples, 1)


def trained(case: str, spread: str, *, accumulation: int, folder: Path) -> dict[str, torch.Tensor]:
    student, teacher = student_of(case), LiveTeacher(model_of(case, 1))
    objective = Objective("forward_kl", {"name": "greedy_topk", "k": 9}, beta=0.5)
    micro = micro_of(case, folder)
    losses: Any = {"streams": ("a", "b"), "losses": [StreamSpec(), StreamSpec(weight=(0.0, 0.0, 1.0))]}
    if spread == "fsdp" and dist.is_initialized():
        student = shard(student, Spread(2))
    args = TrainingArguments(
        str(folder / "trainer"), max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant",
        weight_decay=0.1, gradient_accumulation_steps=accumulation, optim="adamw_torch", use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    model = DistillationModel(student, teacher)
    LedgerTrainer(model, BatchFeed(micro), Ledger(objective, **losses), args).train()
    return {name: whole(p).clone() for name, p in student.named_parameters()}


def main(folder: Path) -> None:
    for case, spread in CASES:
        found = trained(case, spread, accumulation=2, folder=folder)
        if dist.get_rank() == 0:
            save_file(found, folder / f"{case}-{spread}.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    from accelerate import PartialState

    PartialState(cpu=True)
    main(Path(sys.argv[1]))
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
