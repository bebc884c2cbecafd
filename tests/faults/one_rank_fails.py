"""A run on one of two ranks (gloo) where no allocation of the loss fits, on rank 1 alone from step 4 on.

torchrun --nproc-per-node 2 one_rank_fails.py FOLDER PAIR fails|whole

fails: rank 1 ends with 7, and rank 0 must not wait for it. whole: the run goes on, beside one without a break.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from faults.tiny_run import recipe_for
from selectkd.errors import ResourceError
from selectkd.training import step as loss_step
from selectkd.training.run import train

plain = loss_step.weighted_sum
left = [3 * 2]  # three steps of two micro-batches


def short(*given: Any) -> Any:
    if torch.is_grad_enabled():
        left[0] -= 1
    if left[0] < 0 and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("out of memory (injected)")
    return plain(*given)


if __name__ == "__main__":
    torch.set_num_threads(1)
    rank, (folder, pair) = int(os.environ["RANK"]), map(Path, sys.argv[1:3])
    if rank == 1 and sys.argv[3] == "fails":
        loss_step.weighted_sum = short
    try:
        for name in ("run",) if sys.argv[3] == "fails" else ("run", "whole"):
            train(recipe_for(pair, folder / name, accumulation=2, save_every=2))
    except ResourceError as error:
        assert rank == 1 and "Use a smaller training.batch_size" in str(error), error
        os._exit(error.exit_code)
    except RuntimeError as error:  # how gloo says that the other process has gone
        assert rank == 0, error
        print(f"rank 0 heard of it: {str(error)[:60]}")
        sys.stdout.flush()
        os._exit(0)
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
