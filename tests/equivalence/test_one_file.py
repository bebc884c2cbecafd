"""The library equals examples/selectkd_in_one_file.py, step by step, on loss, TAR and weights."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import torch

from selectkd import LiveRows, Objective, distillation_loss, uniforms

PATH = Path(__file__).parents[2] / "examples" / "selectkd_in_one_file.py"


@pytest.fixture(scope="module")
def one_file():
    spec = importlib.util.spec_from_file_location("selectkd_in_one_file", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_stays_readable():
    assert len(PATH.read_text(encoding="utf-8").splitlines()) <= 200


@pytest.mark.parametrize("variant", ["greedy_topk", "spec_k_literal"])
def test_the_library_takes_the_same_steps(one_file, variant):
    student, teacher = (model.double() for model in one_file.tiny_pair())
    batches = one_file.random_batches(6)
    objective = Objective("forward_kl", variant, beta=one_file.BETA)
    n = int(batches[0]["supervised"][:, 1:].sum())
    for step, batch in enumerate(batches):
        if variant == "spec_k_literal":
            batch["uniform"] = uniforms(n, objective.uniforms_per_token, seed=3, step=step)
    ours = copy.deepcopy(student)
    history = one_file.train(student, teacher, batches, learning_rate=3e-3)

    optimizer = torch.optim.AdamW(ours.parameters(), lr=3e-3, weight_decay=0.0)
    for batch, (loss_there, tar_there) in zip(batches, history, strict=True):
        learn = batch["supervised"][:, 1:]
        hidden = ours.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][learn]
        with torch.no_grad():
            teacher_hidden = teacher.model(input_ids=batch["input_ids"]).last_hidden_state[:, :-1][learn]
        scale = (1 / (learn.sum(-1).double() * len(learn)))[learn.nonzero()[:, 0]]
        rows = LiveRows(teacher_hidden, teacher.lm_head.weight.detach())
        loss, sums = distillation_loss(
            hidden, ours.lm_head.weight, rows, objective, batch.get("uniform"), row_scale=scale, chunk=13
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(loss_there, abs=1e-10)
        assert float((scale * sums["row_acceptance"]).sum()) == pytest.approx(tar_there, abs=1e-12)
    for mine, theirs in zip(ours.parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-9)
    assert 0.0 < history[0][1] < 1.0
