"""Twenty steps of a toy run, number for number: a change of the mathematics shows here.

After a change that is meant: python tests/golden/test_golden_run.py writes the file anew.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from selectkd import LiveRows, Objective, distillation_loss, uniforms

FILE = Path(__file__).with_name("golden_run.json")
EXAMPLE = Path(__file__).parents[2] / "examples" / "selectkd_in_one_file.py"


def golden_run() -> list[dict[str, float]]:
    spec = importlib.util.spec_from_file_location("selectkd_in_one_file", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    student, teacher = (model.double() for model in example.tiny_pair())
    objective = Objective("generalized_jsd", {"name": "spec_k", "k": 2}, beta=0.1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, weight_decay=0.0)
    lines = []
    for step, batch in enumerate(example.random_batches(20)):
        learn = batch["supervised"][:, 1:]
        hidden = student.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][learn]
        with torch.no_grad():
            rows = teacher.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][learn]
        uniform = uniforms(hidden.shape[0], 1, seed=7, step=step)
        loss, sums = distillation_loss(
            hidden, student.lm_head.weight, LiveRows(rows, teacher.lm_head.weight), objective, uniform
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lines.append(
            {"loss": loss.item(), "accepted": sums["accepted"].item(), "overlap": sums["overlap"].item()}
        )
    return lines


def test_the_toy_run_gives_the_recorded_numbers():
    for now, then in zip(golden_run(), json.loads(FILE.read_text()), strict=True):
        # fp64 but for the row scale in fp32; 1e-5 leaves room for another processor's order of summation
        assert now == pytest.approx(then, rel=1e-5)


if __name__ == "__main__":
    FILE.write_text(json.dumps(golden_run(), indent=1) + "\n")
