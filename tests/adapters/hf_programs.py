"""A Trainer of transformers on tiny text; as a program, one of two ranks that writes its first gradient."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import Trainer, TrainingArguments

from selectkd.adapters.hf import distil
from selectkd.nn import SelecTKDLoss
from training.tiny import texts, tiny_llama

OURS = ("objective", "reduction", "beta", "options")


def arguments(folder: Path, **changed: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "max_steps": 1, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "optim": "adamw_torch",
        "remove_unused_columns": False, "seed": 42, **changed,
    }  # fmt: skip


def columns(examples: list[Any]) -> list[dict[str, Any]]:
    """The columns of a data set as other people's trainers have them."""
    return [
        {"input_ids": one.input_ids, "attention_mask": [1] * len(one),
         "labels": [i if c else -100 for i, c in zip(one.input_ids, one.completion, strict=True)]}
        for one in examples
    ]  # fmt: skip


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Padded on the right to a multiple of 8, as ours are."""
    width = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8
    blank = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {
        name: torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])
        for name, fill in blank.items()
    }


class InOrder(Trainer):
    """A Trainer that takes its text in order."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)  # type: ignore[arg-type]


def started(
    folder: Path, student: Any, teacher: Any, examples: list[Any], *, size: int, accumulation: int,
    evaluation: Any = None, processing_class: Any = None, **changed: Any,
) -> Any:  # fmt: skip
    """A distilling Trainer of these; arguments of the loss and of the Trainer by name."""
    ours = {name: changed.pop(name) for name in OURS if name in changed}
    args = TrainingArguments(
        **arguments(
            folder, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, **changed
        )
    )
    return distil(InOrder)(
        model=student, args=args, train_dataset=Dataset.from_list(columns(examples)), data_collator=collated,
        eval_dataset=None if evaluation is None else Dataset.from_list(columns(evaluation)), teacher=teacher,
        processing_class=processing_class, **ours,
    )  # fmt: skip


def of_parts(path: Path) -> None:
    """Writes the gradient of logits whose vocabulary lies in parts over the ranks, and that of whole ones."""
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 5, 24, dtype=torch.float64) for _ in range(2))
    labels, loss_fn = (
        torch.randint(0, 24, (2, 5)),
        SelecTKDLoss(verifier={"name": "greedy_topk", "k": 3}, beta=0.1),
    )
    parts, others = (distribute_tensor(one, mesh, [Shard(2)]) for one in (student, teacher))
    parts.requires_grad_()
    loss_fn(parts, others, labels).backward()
    student.requires_grad_()
    loss_fn(student, teacher, labels).backward()
    save_file({"parts": parts.grad.full_tensor(), "whole": student.grad}, path)  # type: ignore[union-attr, dict-item]


if __name__ == "__main__":
    trainer = started(
        Path(sys.argv[1]), tiny_llama(2).double(), tiny_llama(1).double(), texts(8), size=2, accumulation=2
    )
    plain, found = trainer._clip_grad_norm, {}

    def kept(model: Any) -> Any:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return plain(model)

    trainer._clip_grad_norm = kept
    trainer.train()
    save_file(found, Path(sys.argv[1]) / f"rank-{os.environ['RANK']}.safetensors")
    of_parts(Path(sys.argv[1]) / f"vocabulary-{os.environ['RANK']}.safetensors")
    torch.distributed.destroy_process_group()
