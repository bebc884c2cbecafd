"""A user's program with DistillTrainer, for one process or for each of several ranks.

torchrun --nproc-per-node 2 distill_program.py PAIR FOLDER
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from torch import distributed as dist

from selectkd import DistillConfig, DistillTrainer


def distilled(pair: Path, folder: Path, *, accumulation: int = 1) -> dict[str, float]:
    """The held-out measures after four steps; their student and checkpoints are in ``folder``."""
    rows = load_dataset(
        "json", data_files=str(pair / "text.jsonl"), split="train", cache_dir=str(folder / "cache")
    )
    args = DistillConfig(
        output_dir=str(folder), max_steps=4, per_device_train_batch_size=2, per_device_eval_batch_size=3,
        gradient_accumulation_steps=accumulation, learning_rate=1e-3, max_length=32, max_prompt_length=16,
        verifier={"name": "spec_k", "k": 2}, reduction="token_mean", beta=0.1, use_cpu=True, report_to="none",
        save_strategy="steps", save_steps=2, disable_tqdm=True, optim="adamw_torch",
    )  # fmt: skip
    trainer = DistillTrainer(
        model=str(pair / "student"), teacher=str(pair / "teacher"), args=args, train_dataset=rows,
        eval_dataset=rows.select(range(6)),
    )  # fmt: skip
    trainer.train()
    measures = trainer.evaluate()
    trainer.save_model(str(folder / "student"))
    return measures


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = distilled(Path(sys.argv[1]), Path(sys.argv[2]))
    if dist.get_rank() == 0:
        (Path(sys.argv[2]) / "measures.json").write_text(json.dumps(found), "utf-8")
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
