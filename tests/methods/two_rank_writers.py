"""Runs whose text is written on the way, as one of two ranks: a whole one, and one that stops and goes on.

torchrun --nproc-per-node 2 two_rank_writers.py FOLDER PAIR
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from faults.two_rank_runs import StopsAt
from selectkd.config import recipe_from
from selectkd.errors import Preempted
from selectkd.training.run import train

RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # the anchor of alpha is settled after the stop, from sums of both sides of it
    "distillm2": (
        {
            "method": {"name": "distillm2", "adaptive_alpha": True},
            "objective": {"extras": [{"name": "adaptive_alpha", "window": 3}]},
        },
        {},
    ),
    "imitkd": ({"method": "imitkd"}, {"policy": {"name": "student", "probability": 0.7, "replay": 5}}),
    "distillm": ({"method": "distillm"}, {"policy": {"name": "adaptive", "start": 0.8, "capacity": 5}}),
}
"""Name -> what its recipe says, and what its ``data`` says."""


def recipe_for(pair: Path, run: Path, said: dict[str, Any], data: dict[str, Any]) -> Any:
    training = {
        "output_dir": str(run), "max_steps": 5, "batch_size": 2, "learning_rate": 1e-2,
        "max_length": 24, "max_prompt_length": 12, "evaluate_every": 2, "save_every": 2, "probe_samples": 0,
    }  # fmt: skip
    sources = [{"path": str(pair / "text.jsonl"), "name": "made"}]
    return recipe_from(
        {
            "teacher": {"model": str(pair / "teacher")},
            "student": {"model": str(pair / "student")},
            **said,
            "data": {"sources": sources, "evaluation": 0.25, "max_new_tokens": 5, **data},
            "training": training,
        }
    )


def main(folder: Path, pair: Path) -> None:
    for name, (said, data) in RUNS.items():
        train(recipe_for(pair, folder / name / "whole", said, data))
        stops = recipe_for(pair, folder / name / "stops", said, data)
        hook = register_optimizer_step_post_hook(StopsAt(2 if dist.get_rank() == 1 else -1))
        try:
            train(stops)
            raise SystemExit("the stop was not heard")
        except Preempted:
            pass
        hook.remove()
        dist.barrier()
        assert train(stops).resumed_from == 2
        dist.barrier()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
