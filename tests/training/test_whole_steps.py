"""One optimizer step has the loss, the metrics and the gradient of the plain program, whatever features meet in it,
and however its texts are cut into micro-batches and dealt to ranks.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from faults.on_two_ranks import run_on_two_ranks
from selectkd.data.collate import collate
from selectkd.data.supervised import supervised
from selectkd.training.uniforms_of_text import draws, sample_keys
from training.plain_step import plain_step
from training.whole_steps import CASES, FEATURES, METRICS, TEXTS, Case, loss_of, models, step_of, vector


@cache
def plainly(case: Case) -> Tensor:
    """The case by the plain program: each text by itself through whole models."""
    student, teacher, reference = models(case.models)
    student.zero_grad(set_to_none=True)
    r, columns = case.ledger().plan.uniforms_per_token, []
    alone = sorted((collate([one], pad_id=0) for one in TEXTS), key=lambda batch: int(sample_keys(batch)))
    for number, batch in enumerate(alone):
        seen = supervised(batch)
        rows = teacher(batch, seen.position)
        logits = [m(input_ids=batch.input_ids).logits[0][seen.position] for m in (student, reference.model)]
        blank = torch.full((len(seen), logits[0].shape[1] - logits[1].shape[1]), -torch.inf)
        columns.append(
            [
                logits[0], rows.head.logits(rows.hidden), torch.cat([logits[1].detach(), blank], 1), seen.labels,
                draws(batch, seen, r, seed=42, step=1), seen.sequence + number, seen.stream,
            ]
        )  # fmt: skip
    whole = [torch.cat(one) for one in zip(*columns, strict=True)]
    alive = torch.ones(whole[0].shape[1], dtype=torch.bool) if teacher.shared is None else teacher.shared
    loss, metrics = plain_step(case, *whole, alive=alive)
    loss.backward()
    return vector(loss, metrics, student)


def differs(found: Tensor, case: Case) -> str | None:
    """Where a step is not the plain program's, in words."""
    expected = plainly(case)
    numbers = ("loss", *METRICS)
    parts = {name: slice(place, place + 1) for place, name in enumerate(numbers)}
    parts["gradient"] = slice(len(numbers), None)
    assert expected[parts["gradient"]].abs().max() > 0
    for name, rows in parts.items():
        gap, size = (found[rows] - expected[rows]).norm(), expected[rows].norm()
        if not gap <= 1e-6 * size + 1e-9:  # row scales, and so 1 / |y|, are fp32
            return f"{name} off by {float(gap):.2g} of {float(size):.2g}: {case.name}"
    return None


def test_every_pair_of_features_meets_in_a_case() -> None:
    for (a, left), (b, right) in itertools.combinations(FEATURES.items(), 2):
        met = {(getattr(case, a), getattr(case, b)) for case in CASES}
        assert met == set(itertools.product(left, right)), (a, b)


def test_a_step_is_the_plain_programs() -> None:
    wrong = []
    for case in CASES:
        if case.ranks == 1:
            wrong.append(differs(step_of(case, case.batches(), *loss_of(case)), case))
    assert not any(wrong), "\n".join(filter(None, wrong))


def test_a_step_of_two_ranks_is_the_plain_programs(tmp_path: Path) -> None:
    run_on_two_ranks(Path(__file__).with_name("whole_steps.py"), str(tmp_path))
    cases = {case.name: case for case in CASES if case.ranks == 2}
    wrong = []
    for rank in (0, 1):
        of_rank = load_file(tmp_path / f"{rank}.safetensors")
        assert of_rank.keys() == cases.keys()
        wrong += [
            f"rank {rank}: {told}" for name, found in of_rank.items() if (told := differs(found, cases[name]))
        ]
    assert not wrong, "\n".join(wrong)
