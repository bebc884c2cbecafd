"""What the probe notes of every token, against the plain program."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from selectkd import Objective
from selectkd.data.collate import collate
from selectkd.data.supervised import supervised
from selectkd.objective.pair import topk_pair
from selectkd.teachers.live import LiveTeacher
from selectkd.training.heldout import tokens
from selectkd.training.heldout.evaluation import probe
from selectkd.training.heldout.tokens import OF_LOSS, OF_PAIR, look
from selectkd.training.record import looks
from selectkd.training.record.looks import MOST_LOOKS, LookLog, pieces
from training.tiny import recipe_of, texts, tiny_llama, tiny_tokenizer, write_pair

GREEDY = Objective("forward_kl", {"name": "greedy_topk", "k": 3}, beta=0.1)


@pytest.fixture
def batch() -> Any:
    return collate(texts(5), pad_id=0)


def log_probs(model: Any, batch: Any, position: Any) -> Any:
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return torch.log_softmax(logits.flatten(0, 1)[position].double(), -1)


@pytest.mark.parametrize("reduction", ["sequence_mean", "token_mean"])
def test_columns_of_a_look_equal_the_plain_program(
    student: Any, teacher_model: Any, batch: Any, reduction: str
) -> None:
    rows = supervised(batch)
    found = look(student, LiveTeacher(teacher_model), batch, GREEDY, reduction=reduction)
    logp, logq = (log_probs(model, batch, rows.position) for model in (teacher_model, student))
    p, q, at = logp.exp(), logq.exp(), torch.arange(len(rows))
    proposal, best = q.argmax(-1), p.argmax(-1)
    rank = (p > p[at, proposal, None]).sum(-1) + 1
    kl = (p * (logp - logq)).sum(-1)
    weight = torch.where(rank <= 3, 1.0, 0.1)
    scale = 1 / (rows.length[rows.sequence] * 5) if reduction == "sequence_mean" else 1 / len(rows)
    loss = scale * weight * kl
    expected = {
        "label": rows.labels, "proposal": proposal, "rank": rank, "teacher_top": best,
        "p_proposal": p[at, proposal], "q_proposal": q[at, proposal], "p_teacher_top": p[at, best],
        "q_teacher_top": q[at, best], "p_label": p[at, rows.labels], "q_label": q[at, rows.labels],
        "teacher_entropy": -(p * logp).sum(-1), "student_entropy": -(q * logq).sum(-1),
        "acceptance": (rank <= 3).double(), "divergence": kl, "weight": weight,
        "overlap": torch.minimum(p, q).sum(-1), "unverified": torch.zeros(len(rows)), "share": loss / loss.sum(),
    }  # fmt: skip
    assert set(found) == {"sample", "token", *expected} and set(expected) >= {*OF_PAIR, *OF_LOSS}
    for name, values in expected.items():
        # fp32 against fp64: sums over 50 tokens
        assert torch.allclose(found[name].double(), values.double(), rtol=2e-5, atol=2e-6), name
    placed = batch.input_ids[found["sample"], found["token"]]
    assert placed.equal(rows.labels)


def test_a_proposal_outside_a_stored_top_k_is_named_and_has_no_rank(
    student: Any, teacher_model: Any, batch: Any
) -> None:
    from selectkd.loss.teacher_rows import CachedRows

    rows = supervised(batch)
    logp = log_probs(teacher_model, batch, rows.position).float()
    stored = logp.topk(4)

    def teacher(batch: Any, position: Any) -> CachedRows:
        return CachedRows(stored.indices, stored.values)

    found = look(student, teacher, batch, GREEDY)
    logq = log_probs(student, batch, rows.position)
    proposal = logq.argmax(-1)
    assert found["proposal"].long().equal(proposal)
    inside = (stored.indices == proposal[:, None]).any(-1)
    assert inside.any() and not inside.all()
    assert (found["rank"][inside] > 0).all() and (found["rank"][~inside] == -1).all()
    assert found["p_proposal"][~inside].isnan().all()
    assert torch.allclose(found["q_proposal"].double(), logq.exp().amax(-1), rtol=1e-5)
    pair = topk_pair(stored.indices, stored.values, logq.float())
    entropy = -(pair.logp.exp() * pair.logp).sum(-1)
    assert torch.allclose(found["teacher_entropy"].float(), entropy, rtol=1e-4)


def test_verdicts_are_those_of_the_probe_and_depend_on_no_chunk(
    student: Any, teacher_model: Any, batch: Any
) -> None:
    objective = Objective("forward_kl", {"name": "spec_k", "k": 2}, beta=0.0)
    teacher = LiveTeacher(teacher_model)
    whole = look(student, teacher, batch, objective, seed=3)
    pieced = look(student, teacher, batch, objective, seed=3, chunk=2)
    assert whole["acceptance"].equal(probe(student, teacher, batch, objective, seed=3))
    for name, values in whole.items():
        assert torch.allclose(values.double(), pieced[name].double(), rtol=1e-5, equal_nan=True), name


def test_bytes_that_are_no_letter_and_special_tokens_have_a_text() -> None:
    tokenizer = tiny_tokenizer()
    found = pieces(tokenizer, range(len(tokenizer)))
    assert set(found) == set(range(len(tokenizer))) and all(
        isinstance(one, str) and one for one in found.values()
    )


def test_looks_are_thinned_and_those_after_a_checkpoint_go(
    tmp_path: Path, student: Any, teacher_model: Any, batch: Any, monkeypatch: Any
) -> None:
    columns = look(student, LiveTeacher(teacher_model), batch, GREEDY)
    monkeypatch.setattr(looks, "MOST_ROWS", 7)
    log = LookLog(tmp_path, tiny_tokenizer())
    for step in range(0, 80, 2):
        log.write(step, columns, batch, ["a", "b"])
    steps = log._steps()
    assert len(steps) == MOST_LOOKS and steps[0] == 0 and steps[-1] == 78
    assert max(b - a for a, b in itertools.pairwise(steps)) <= 4 * 2
    with safe_open(tmp_path / "probe" / "step-0000078.safetensors", "pt") as file:
        kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        noted = json.loads(file.metadata()["look"])
    assert noted["rows"] == len(columns["sample"]) and noted["step"] == 78
    assert {len(values) for values in kept.values()} == {7}
    assert kept["divergence"].equal(columns["divergence"][:7].float())
    assert {str(one) for one in kept["proposal"].tolist()} <= set(noted["pieces"])
    log.forget_after(40)
    assert log._steps()[-1] <= 40
    assert tokens.WHOLE[0] == "sample"


def test_a_run_taken_up_again_leaves_the_looks_of_an_unbroken_one(
    tmp_path: Path, recipe_in: Callable[[str, int], Any]
) -> None:
    from selectkd.training.run import train

    train(recipe_in("whole", 4))
    broken = recipe_in("broken", 4)
    from selectkd.training.record.metrics import MetricsLog

    seen = MetricsLog.write

    def breaks(self: Any, line: dict[str, Any]) -> None:
        seen(self, line)
        if line["step"] == 3 and "loss" in line:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsLog, "write", breaks)
        train(broken)
    (tmp_path / "broken" / "probe" / "step-0000099.safetensors").write_bytes(b"of a killed run")
    train(broken)
    folders = [tmp_path / name / "probe" for name in ("whole", "broken")]
    files = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert files[0] == files[1] and len(files[0]) == 4
    clock = (tmp_path / "broken" / "timings.jsonl").read_text("utf-8")
    assert [json.loads(line)["step"] for line in clock.splitlines() if "resumed" in line] == [2]


@pytest.fixture
def recipe_in(tmp_path: Path) -> Callable[[str, int], Any]:
    from selectkd.config import recipe_from

    write_pair(tmp_path, tiny_llama(1, layers=3))

    def made(name: str, steps: int) -> Any:
        training = {
            "output_dir": str(tmp_path / name), "max_steps": steps, "batch_size": 3, "max_length": 24,
            "max_prompt_length": 12, "evaluate_every": 2, "save_every": 2,
        }  # fmt: skip
        return recipe_from({**recipe_of(tmp_path, data={"evaluation": 0.25}), "training": training})

    return made
