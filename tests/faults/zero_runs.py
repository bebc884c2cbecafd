"""Whole runs on one of two ranks, by DeepSpeed's ZeRO or beside it by DDP; what they leave is compared afterwards.

torchrun --nproc-per-node 2 zero_runs.py FOLDER PAIR ddp|2|3

On a CPU DeepSpeed needs DS_ACCELERATOR=cpu, which this script sets where there is no GPU.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed as dist

from faults.tiny_run import recipe_for
from faults.two_rank_runs import Poison, goes_on_after_a_stop
from selectkd.config import recipe_from
from selectkd.errors import NumericsError
from selectkd.training.checkpoint.encoding import whole
from selectkd.training.run import train

SETTING: dict[str, Any] = {"engine": "trainer", "accumulation": 2, "save_every": 2}
ROWS: dict[str, dict[str, Any]] = {
    "plain": {"training": {}},
    "clipped": {"training": {"max_grad_norm": 0.1}, "objective": {"reduction": "weight_mean"}},
    "decayed": {"training": {"weight_decay": 0.1}, "objective": {"divergence": {"name": "reverse_kl"}}},
    "best put back": {
        "training": {"early_stopping": {"patience": 1}, "learning_rate": 0.1, "evaluate_every": 2}
    },
}


def recipe_of(pair: Path, folder: Path, changes: dict[str, Any]) -> Any:
    recipe = recipe_for(pair, folder, **{**SETTING, **changes["training"]})
    values = recipe.model_dump(mode="json", exclude_none=True)
    return recipe_from({**values, "objective": {**values["objective"], **changes.get("objective", {})}})


def finite(student: Any) -> None:
    """Also of the parts: what a rank holds of a parameter under ZeRO-3."""
    for name, parameter in student.named_parameters():
        for mine in (parameter, getattr(parameter, "ds_tensor", parameter)):
            assert mine.isfinite().all(), name


def main(folder: Path, pair: Path, kind: str) -> None:
    rank = int(os.environ["RANK"])
    for name, changes in ROWS.items():
        result = train(recipe_of(pair, folder / name, changes))
        assert result.skipped == 0, result

    students = []

    def poisoned(made: Any) -> None:
        students.append(made.student)
        if rank == 1:  # micro-batch 1 of step 2
            made.student.get_decoder().register_forward_hook(Poison(3))

    result = train(recipe_of(pair, folder / "whole", ROWS["plain"]), on_assembled=poisoned)
    assert result.skipped == 1 and result.steps == 6, result
    finite(students[-1])

    passes: list[int] = []

    def broken(made: Any) -> None:
        """The teacher's rows of step 3 are not finite: the run ends, and the step is not taken."""
        students.append(made.student)
        made.student.get_decoder().register_forward_hook(
            lambda module, *_: passes.extend([1] * module.training)
        )
        made.teacher.model.get_decoder().register_forward_hook(spoil)

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if len(passes) > 4:
            output.last_hidden_state[:] = torch.nan
        return output

    try:
        train(recipe_of(pair, folder / "teacher", ROWS["plain"]), on_assembled=broken)
        raise SystemExit("the teacher was believed")
    except NumericsError as error:
        assert "step 3" in str(error) and "rows of the teacher are not finite" in str(error), error
    saved = load_file(folder / "teacher" / "checkpoints" / "step-00000002" / "student.safetensors")
    for name, parameter in students[-1].named_parameters():
        assert torch.equal(whole(parameter), saved[name]), f"{name} moved in a step that was not to be taken"

    asked = 1 if kind == "ddp" else 2  # DeepSpeed asks the optimizer once for each of its two groups
    stops = recipe_of(pair, folder / "stops", ROWS["plain"])
    resumed_from = goes_on_after_a_stop(stops, poisoned, optimizer_steps=2 * asked)
    if rank == 0:
        print(f"{kind}: gone on from step {resumed_from}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[3] != "ddp":
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = sys.argv[3]
        os.environ["LOCAL_WORLD_SIZE"] = "2"
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
