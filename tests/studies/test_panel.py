"""The shadow panel says what each judge says alone, on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from selectkd.cli.app import main
from selectkd.errors import DataError
from selectkd.evals.studies.panel import gates, jaccard, panel
from selectkd.objective.objective import Objective
from selectkd.teachers import LiveTeacher
from selectkd.training.heldout.evaluation import probe
from training.tiny import padded, texts, tiny_llama, write_pair

SPECS = {
    "greedy_topk": {"name": "greedy_topk", "k": 5},
    "matched_shuffle": {"name": "matched_shuffle", "k": 5},
    "expected_spec_k": {"name": "expected_spec_k", "k": 2},
    "tip": {"name": "tip", "share": 0.5},
    "prefix_gate": {"name": "prefix_gate", "k": 20},
}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    student, teacher = tiny_llama(2), LiveTeacher(tiny_llama(1, layers=3))
    return panel(student, teacher, padded(texts(9), 3), gates(SPECS), beta=0.1, seed=4)


@pytest.mark.parametrize("name", ["greedy_topk", "expected_spec_k", "tip", "prefix_gate"])
def test_a_judge_of_the_panel_says_what_it_says_alone(name: str, seen: dict[str, Any]) -> None:
    student, teacher = tiny_llama(2), LiveTeacher(tiny_llama(1, layers=3))
    objective = Objective("forward_kl", SPECS[name], beta=0.1)
    alone = torch.cat([probe(student, teacher, batch, objective, seed=4) for batch in padded(texts(9), 3)])
    row = seen["gates"][name]
    assert seen["n"] == alone.shape[0] and row["rate"] == pytest.approx(float(alone.mean()), rel=1e-6)
    for bins in (row["by_position"], row["by_entropy"]):
        assert sum(part["n"] for part in bins) == seen["n"]
        whole = sum(part["n"] * part["acceptance"] for part in bins) / seen["n"]
        assert whole == pytest.approx(row["rate"])


def test_gates_judge_at_the_temperature_of_verification_and_the_loss_is_that_at_1() -> None:
    student, model = tiny_llama(2), tiny_llama(1, layers=3)
    batch, rates = padded(texts(4), 4)[0], {}
    for temperature in (1.0, 5.0):
        for name in ("expected_spec_k", "tip"):
            objective = Objective("forward_kl", SPECS[name], verify_temperature=temperature)
            a = probe(student, LiveTeacher(model), batch, objective, seed=4).double()
            seen = panel(
                student, LiveTeacher(model), [batch], gates({name: SPECS[name]}), beta=0.0, seed=4,
                verify_temperature=temperature,
            )["gates"][name]  # fmt: skip
            assert seen["rate"] == pytest.approx(float(a.mean()), rel=1e-6)
            kl = torch.cat(
                [
                    (logp.exp() * (logp - logq)).sum(-1)[torch.tensor(example.completion[1:])]
                    for ids, example in zip(batch.samples(), texts(4), strict=True)
                    for logp, logq in [
                        [m(ids[None]).logits[0, :-1].detach().log_softmax(-1) for m in (model, student)]
                    ]
                ]
            ).double()
            assert seen["loss_removed"] == pytest.approx(float(1 - (a * kl).sum() / kl.sum()), rel=1e-5)
            rates[name, temperature] = seen["loss_removed"]
    one, other = (rates["expected_spec_k", temperature] for temperature in (1.0, 5.0))
    assert abs(one - other) > 0.01 * one  # the temperature counts


def test_loss_and_gradient_removed_are_those_of_the_plain_formula() -> None:
    student, model = tiny_llama(2), tiny_llama(1, layers=3)
    batch = padded(texts(4), 4)[0]
    seen = panel(
        student, LiveTeacher(model), [batch], gates({"k": {"name": "greedy_topk", "k": 9}}), beta=0.1
    )
    kl, gradient, accepted = [], [], []
    for ids, example in zip(batch.samples(), texts(4), strict=True):
        logp, logq = (m(ids[None]).logits[0].detach().log_softmax(-1) for m in (model, student))
        for place, trained in enumerate(example.completion[1:]):
            if trained:
                p, q = logp[place].exp(), logq[place].exp()
                kl.append(float((p * (p / q).log()).sum()))
                gradient.append(float((q - p).norm()))
                accepted.append(int(logq[place].argmax()) in logp[place].topk(9).indices.tolist())
    weight = [1.0 if one else 0.1 for one in accepted]
    assert 0 < sum(accepted) < len(accepted)
    row = seen["gates"]["k"]
    for name, amount in (("loss_removed", kl), ("gradient_removed", gradient)):
        left = sum(w * a for w, a in zip(weight, amount, strict=True)) / sum(amount)
        assert row[name] == pytest.approx(1 - left, rel=1e-4)  # fp32


def test_the_overlap_is_the_jaccard_index_and_the_same_both_ways(seen: dict[str, Any]) -> None:
    table = seen["jaccard"]
    for one, row in table.items():
        for other, value in row.items():
            assert 0 <= value <= 1 and value == table[other][one]
    assert jaccard(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 0.0])) == pytest.approx(1 / 3)
    assert jaccard(torch.zeros(3), torch.zeros(3)) == 1.0


def test_text_without_a_trained_token_is_refused() -> None:
    with pytest.raises(DataError, match="nothing to compare"):
        panel(tiny_llama(2), LiveTeacher(tiny_llama(1)), [], gates())


def test_panel_of_a_recipe_has_every_judge(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    content = {
        "teacher": {"model": str(tmp_path / "teacher")},
        "student": {"model": str(tmp_path / "student")},
        "reference": {"model": str(tmp_path / "student")},
        "data": {"sources": [{"path": str(tmp_path / "text.jsonl")}]},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 8, "max_length": 24,
                     "max_prompt_length": 12},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content), "utf-8")
    assert main(["study", "panel", str(tmp_path / "recipe.yaml"), "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert set(json.loads(printed.out)["gates"]) == set(gates(reference=True)) and "adaspec" in printed.err
    assert not (tmp_path / "run").exists()
