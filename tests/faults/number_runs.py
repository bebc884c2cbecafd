"""The rows N1 to N8 of the faults as whole runs on one of two ranks (gloo).

torchrun --nproc-per-node 2 number_runs.py FOLDER PAIR

After every row both ranks must have left out the same steps and hold the same parameters, all of them finite.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from faults.tiny_run import recipe_for
from faults.two_rank_runs import Poison
from selectkd.config import recipe_from
from selectkd.errors import SelectKDError
from selectkd.training import step as loss_step
from selectkd.training.run import train
from training.tiny import VOCABULARY

Fault = Callable[[Any, int], None]


def nothing(made: Any, rank: int) -> None:
    """No fault."""


def teacher_hidden(value: float, rows: Any, *, everywhere: bool = False) -> Fault:
    """The teacher's last hidden states at ``rows`` of the first text of each batch of rank 1."""

    def fault(made: Any, rank: int) -> None:
        def spoil(module: Any, inputs: Any, output: Any) -> Any:
            output.last_hidden_state[slice(None) if everywhere else 0, rows] = value
            return output

        if rank == 1 or everywhere:
            made.teacher.model.get_decoder().register_forward_hook(spoil)

    return fault


def forbidden(made: Any, rank: int) -> None:
    """The teacher's logits of ids 40 to 59 are -inf, where the student is sure of one of them."""
    bias = torch.zeros(VOCABULARY)
    bias[40:60] = -torch.inf
    made.teacher.head = replace(made.teacher.head, bias=bias)
    with torch.no_grad():
        made.student.get_output_embeddings().weight[40] *= 20


def student_at(*passes: int) -> Fault:
    """The student's hidden states on rank 1 are NaN at these training passes."""

    def fault(made: Any, rank: int) -> None:
        for at in passes if rank == 1 else ():
            made.student.get_decoder().register_forward_hook(Poison(at))

    return fault


def no_room(made: Any, rank: int) -> None:
    """One allocation of the loss fails, on rank 1."""
    plain, left = loss_step.weighted_sum, [1]

    def short(*given: Any) -> Any:
        if rank == 1 and left:
            left.pop()
            raise torch.OutOfMemoryError("out of memory (injected)")
        return plain(*given)

    loss_step.weighted_sum = short


def never_any_room(made: Any, rank: int) -> None:
    """Every allocation of the loss fails, on both ranks, whatever the chunk is."""

    def short(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory (injected)")

    loss_step.weighted_sum = short


def nothing_to_train(all_but: int) -> Fault:
    """No token of the training text is supervised, in all samples but the first few."""

    def fault(made: Any, rank: int) -> None:
        (source,) = made.sources
        (table,) = source.examples.tables
        plain, kept = table.example, set(source.examples.places[:all_but].tolist())

        def example(row: int) -> Any:
            one = plain(row)
            return one if row in kept else replace(one, completion=[False] * len(one))

        table.example = example

    return fault


@dataclass(frozen=True)
class Row:
    """A fault, what the recipe changes, how many steps are left out, and the exit code the run ends with.

    tar, loss: of every step, where they are forced. text: completions in place of the pair's.
    """

    fault: Fault = nothing
    objective: dict[str, Any] | None = None
    left_out: int = 0
    exit_code: int = 0
    steps: int = 3
    tar: float | None = None
    loss: float | None = None
    text: str | None = None


def objective(verifier: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"verifier": verifier, **more}


def forced(share: float) -> dict[str, Any]:
    """A verifier that accepts this share whatever the models say: 0 none, 1 all."""
    return {"name": "matched_random", "rate": share}


GREEDY = {"name": "greedy_topk", "k": 20}
ROWS: dict[str, Row] = {
    **{f"N1 one row {value}": Row(teacher_hidden(value, 8)) for value in (math.nan, math.inf, -math.inf)},
    "N1 every row": Row(teacher_hidden(math.nan, slice(None), everywhere=True), exit_code=6),
    **{
        f"N2 {name}": Row(forbidden, objective(GREEDY, beta=0.5, divergence={"name": name}))
        for name in ("forward_kl", "reverse_kl", "skew_kl", "skew_reverse_kl", "generalized_jsd")
    },
    "N3 one micro-batch of rank 1": Row(student_at(3), left_out=1),
    "N4 four steps in a row": Row(student_at(*range(3, 12)), left_out=4, exit_code=6, steps=6),
    "N6 beta 0": Row(objective=objective(GREEDY, beta=0.0)),
    "N6 beta 1": Row(objective=objective(GREEDY, beta=1.0)),
    "N6 k 1": Row(objective=objective({"name": "greedy_topk", "k": 1}, beta=0.0)),
    "N5 some batches without a token": Row(nothing_to_train(3)),
    "N5 no batch with a token": Row(nothing_to_train(0), loss=0.0),
    "N5 no token in the whole data set": Row(text="", exit_code=3),
    "N6 k = V, everything accepted": Row(
        objective=objective({"name": "greedy_topk", "k": VOCABULARY}, beta=0.0), tar=1.0
    ),
    "N6 k = V + 1": Row(objective=objective({"name": "greedy_topk", "k": VOCABULARY + 1}), exit_code=2),
    "N6 TAR 0, beta 0": Row(objective=objective(forced(0.0), beta=0.0), tar=0.0, loss=0.0),
    "N6 TAR 0, the paper's beta": Row(objective=objective(forced(0.0), beta=0.01), tar=0.0),
    "N6 TAR 1, beta 0": Row(objective=objective(forced(1.0), beta=0.0), tar=1.0),
    "N8 one allocation": Row(no_room),
    "N8 every allocation": Row(never_any_room, exit_code=7),
}  # fmt: skip


def digest(student: Any) -> str:
    """Of all parameters' bytes; they must be finite."""
    seen = hashlib.sha256()
    for name, parameter in student.named_parameters():
        assert parameter.isfinite().all(), name
        seen.update(parameter.detach().numpy().tobytes())
    return seen.hexdigest()


def run(name: str, row: Row, folder: Path, pair: Path, rank: int) -> None:
    recipe = recipe_for(pair, folder, accumulation=2, save_every=None, max_steps=row.steps)
    values = recipe.model_dump(mode="json", exclude_none=True)
    if row.objective is not None:
        recipe = recipe_from({**values, "objective": row.objective})
    if row.text is not None:
        file = folder.with_suffix(f".{rank}.jsonl")
        file.write_text('{"prompt": "w1 w2", "completion": "' + row.text + '"}\n' * 24, "utf-8")
        recipe = recipe_from({**values, "data": {**values["data"], "sources": [{"path": str(file)}]}})
    seen: dict[str, Any] = {}

    def assembled(made: Any) -> None:
        seen["made"] = made
        row.fault(made, rank)

    plain, code = loss_step.weighted_sum, 0
    try:
        train(recipe, on_assembled=assembled)
    except SelectKDError as error:
        code = error.exit_code
    finally:
        loss_step.weighted_sum = plain
    mine = sorted(path.name[:11] for path in (folder / "bad_batches").glob(f"*-rank-{rank}.json"))
    told: list[Any] = [None, None]
    dist.all_gather_object(told, (code, mine, digest(seen["made"].student) if seen else None))
    assert told[0] == told[1], f"{name}: the ranks differ: {told}"
    assert code == row.exit_code and len(mine) == row.left_out, f"{name}: exit code {code}, left out {mine}"
    if code == 0:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        steps = [line for line in lines if "loss" in line]
        assert len(steps) == row.steps - row.left_out or row.left_out, f"{name}: {len(steps)} lines"
        for key, wanted in (("tar", row.tar), ("loss", row.loss)):
            assert wanted is None or {line[key] for line in steps} == {wanted}, f"{name}: {key} in {steps}"


def main(root: Path, pair: Path) -> None:
    rank = int(os.environ["RANK"])
    for number, (name, row) in enumerate(ROWS.items()):
        run(name, row, root / str(number), pair, rank)
        if rank == 0:
            print(f"{name}: finite, both ranks alike")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
