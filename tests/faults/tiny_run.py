"""Tiny real runs that faults are brought to: a pair with dropout on disk, recipes for it, and what a run left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from selectkd.config import Recipe
from selectkd.config.load import recipe_from
from selectkd.training.checkpoint.folder import all_in
from training.tiny import tiny_llama, tiny_tokenizer, write_pair

VERIFIERS: dict[str, dict[str, Any]] = {
    "greedy": {"name": "greedy_topk", "k": 20},
    "spec_k": {"name": "spec_k", "k": 2},
}


def write_dropping_pair(root: Path) -> Path:
    """The tiny pair, the student with dropout, so that a step draws from torch's generator."""
    write_pair(root, tiny_llama(1, layers=1))
    student = tiny_llama(2, layers=1)
    student.config.attention_dropout = 0.2
    student.save_pretrained(root / "student")
    tiny_tokenizer().save_pretrained(root / "student")
    return root


def recipe_for(
    pair: Path,
    run: Path,
    *,
    verifier: str = "greedy",
    lora: bool = False,
    accumulation: int = 1,
    cache: Path | None = None,
    save_every: int | str | None = 2,
    **training: Any,
) -> Recipe:
    """A recipe of six steps over the pair in ``pair``."""
    teacher: dict[str, Any] = {"model": str(pair / "teacher")}
    adapters = {"r": 2, "alpha": 4, "dropout": 0.2, "target_modules": ["q_proj", "v_proj"]}
    return recipe_from(
        {
            "teacher": teacher if cache is None else {**teacher, "cache": str(cache)},
            "student": {"model": str(pair / "student")},
            "data": {"sources": [{"path": str(pair / "text.jsonl"), "name": "made"}], "evaluation": 0.25},
            "objective": {
                "verifier": VERIFIERS[verifier],
                "beta": {"start": 0.5, "end": 0.1, "until_tar": 0.9},
            },
            "training": {
                "output_dir": str(run),
                "max_steps": 6,
                "batch_size": 3,
                "gradient_accumulation": accumulation,
                "learning_rate": 1e-2,
                "max_length": 32,
                "max_prompt_length": 16,
                "lora": adapters if lora else None,
                "evaluate_every": 3,
                "save_every": save_every,
                **training,
            },
        }
    )


def left(run: Path) -> dict[str, bytes]:
    """What must be the same to the byte: metrics, the student's files, and every tensor of the newest checkpoint."""
    found = {"metrics.jsonl": (run / "metrics.jsonl").read_bytes()}
    for path in sorted((run / "student").iterdir()):
        if path.name != "README.md":
            found[f"student/{path.name}"] = path.read_bytes()
    newest = all_in(run / "checkpoints")
    if newest:
        for path in sorted(newest[0].iterdir()):
            if path.suffix == ".safetensors":
                with safe_open(path, "np") as file:
                    for name in sorted(file.keys()):
                        found[f"{path.stem}/{name}"] = file.get_tensor(name).tobytes()
            elif path.name not in ("MANIFEST.json", "metrics.json"):
                found[path.name] = path.read_bytes()
    return found


def steps_of(run: Path) -> list[int]:
    """The steps of metrics.jsonl in the order they stand there."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [line["step"] for line in lines if "loss" in line]
