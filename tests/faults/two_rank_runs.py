"""Whole runs on one of two ranks (gloo): a step that is not finite on one, a stop that only one hears of, going on.

torchrun --nproc-per-node 2 two_rank_runs.py FOLDER PAIR
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook

from faults.tiny_run import recipe_for
from selectkd.errors import Preempted
from selectkd.training.run import train


class Poison:
    """Makes the student's hidden states NaN at the n-th training forward pass."""

    def __init__(self, at: int) -> None:
        self.at, self.passes = at, 0

    def __call__(self, module: Any, inputs: Any, output: Any) -> Any:
        if module.training:
            self.passes += 1
            if self.passes == self.at:
                output.last_hidden_state = output.last_hidden_state * torch.nan
        return output


class StopsAt:
    """Sends this process a SIGTERM after so many optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, optimizer: Any, *_: Any) -> None:
        self.step -= 1
        if self.step == 0:
            os.kill(os.getpid(), signal.SIGTERM)


def goes_on_after_a_stop(recipe: Any, poisoned: Callable[[Any], None], *, optimizer_steps: int = 2) -> int:
    """A run that rank 1 is told to stop in its second step, gone on with; returns the step it went on from.

    optimizer_steps: how often an optimizer is asked by then.
    """
    stopper = StopsAt(optimizer_steps if os.environ["RANK"] == "1" else -1)
    hook = register_optimizer_step_post_hook(stopper)
    try:
        train(recipe, on_assembled=poisoned)
        raise SystemExit("the stop was not heard")
    except Preempted as stopped:
        assert "the state of step" in str(stopped), stopped
    hook.remove()
    dist.barrier()
    result = train(recipe)
    assert result.skipped == 1 and result.resumed_from in (2, 3), result
    dist.barrier()
    return result.resumed_from


def main(folder: Path, pair: Path) -> None:
    rank = int(os.environ["RANK"])
    setting: dict[str, Any] = {"accumulation": 2, "save_every": 2}

    def poisoned(made: Any) -> None:
        if rank == 1:  # micro-batch 1 of step 2
            made.student.get_decoder().register_forward_hook(Poison(3))

    result = train(recipe_for(pair, folder / "whole", **setting), on_assembled=poisoned)
    assert result.skipped == 1 and result.steps == 6, result

    goes_on_after_a_stop(recipe_for(pair, folder / "stops", **setting), poisoned)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
