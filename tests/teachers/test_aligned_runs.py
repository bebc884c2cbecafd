"""`selectkd train` with a teacher of another tokenizer, and the recipes that it cannot serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from selectkd.cli import main
from selectkd.config import recipe_from
from selectkd.teachers.aligned import AlignedPlan
from selectkd.teachers.open import plan_teacher
from teachers.tokens import TEXT, byte_level, model_for


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("across")
    for name, tokenizer, seed in (
        ("student", byte_level(300, text=TEXT[1:]), 1),
        ("teacher", byte_level(330, end="<|stop|>"), 2),
        ("same", byte_level(300, text=TEXT[1:]), 3),
    ):
        model_for(tokenizer, seed, dtype=torch.float32).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    with (root / "text.jsonl").open("w", encoding="utf-8") as file:
        for i in range(12):
            words = " ".join(TEXT).split(" ")
            start = 3 * i % len(words)
            text = " ".join((words * 2)[start : start + 14])
            file.write(json.dumps({"prompt": text[:20], "completion": text[20:]}) + "\n")
    return root


def recipe(root: Path, out: Path, *, across, objective, **more) -> str:
    content = {
        "teacher": {"model": str(root / "teacher"), "cross_tokenizer": across},
        "student": {"model": str(root / "student")},
        "data": {"sources": [{"path": str(root / "text.jsonl")}], "evaluation": {"path": str(root / "text.jsonl")}},
        "objective": objective,
        "training": {
            "output_dir": str(out / "run"), "max_steps": 8, "batch_size": 4, "learning_rate": 1e-2,
            "max_length": 128, "max_prompt_length": 32,
        },
        **more,
    }  # fmt: skip
    if across is None:
        del content["teacher"]["cross_tokenizer"]
    path = out / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return str(path)


GOLD = {"divergence": "forward_kl", "verifier": {"name": "greedy_topk", "k": 20}, "beta": 0.1}


@pytest.mark.parametrize(
    ("across", "objective"),
    [
        ({"unverified_weight": 0.5, "matched_weight": 0.9}, GOLD),
        ("spans", {"divergence": "uld", "verifier": "always"}),
        ("index", {"divergence": "uld", "verifier": "always"}),
    ],
)
def test_a_run_learns_from_a_teacher_of_another_tokenizer(root, tmp_path, across, objective):
    assert main(["train", recipe(root, tmp_path, across=across, objective=objective)]) == 0
    lines = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
    steps = [line for line in lines if "loss" in line]
    assert all(0 <= line["unverified"] < 1 for line in steps) and any(
        line["unverified"] > 0 for line in steps
    )
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text("utf-8"))
    assert manifest["after"]["unverified"] > 0 and manifest["after"]["teacher_perplexity"] is None
    if objective is GOLD:  # the weight of a token changes with its verdict, so the loss itself may rise
        assert manifest["after"]["kl"] < manifest["before"]["kl"]
    else:
        first, second = (sum(line["loss"] for line in steps[place : place + 3]) for place in (0, 3))
        assert second < first  # over the same samples twice


@pytest.mark.parametrize(
    ("across", "objective", "told"),
    [
        (None, GOLD, "cross_tokenizer: spans"),
        ("spans", {**GOLD, "verifier": "spec_k"}, "token by token"),
        ("spans", {"divergence": "taid"}, "no f-divergence"),
        ("spans", {"selector": "se_kd"}, "token by token"),
        ("spans", {**GOLD, "temperature": 2.0}, "at temperature 1"),
        (
            "spans",
            {**GOLD, "extras": ["atkd"]},
            "extras atkd ask for the teacher's probability of the text's own",
        ),
        ("spans", {**GOLD, "divergence": "skew_kl", "extras": ["adaptive_alpha"]}, "has another tokenizer"),
        (
            "spans",
            {"divergence": "cross_entropy", "verifier": "always"},
            "objective.divergence = cross_entropy",
        ),
        ("index", GOLD, "pairing: spans, or objective.divergence: uld"),
        ("index", {"divergence": "uld"}, "nothing to verify"),
        ("letters", GOLD, "spans"),
        ({"unverified_weight": 1.5}, GOLD, "unverified_weight"),
    ],
)
def test_what_cannot_be_exact_enough_is_refused_before_weights_load(
    root, tmp_path, capsys, monkeypatch, across, objective, told
):
    monkeypatch.setattr("selectkd.training.assembly.load_model", None)  # a call would raise
    assert main(["train", recipe(root, tmp_path, across=across, objective=objective)]) == 2
    assert told in capsys.readouterr().err


def test_a_reference_student_has_no_place_across_tokenizers(root, tmp_path, capsys):
    path = recipe(root, tmp_path, across="spans", objective=GOLD, reference={"model": str(root / "same")})
    assert main(["train", path]) == 2
    assert "another tokenizer" in capsys.readouterr().err


def test_a_teacher_of_another_tokenizer_stands_beside_no_other(root, tmp_path, capsys):
    path = recipe(
        root, tmp_path, across="spans", objective=GOLD,
        teacher=[
            {"model": str(root / "teacher"), "cross_tokenizer": "spans", "weight": 1.0},
            {"model": str(root / "same"), "weight": 1.0},
        ],
    )  # fmt: skip
    assert main(["train", path]) == 2
    assert "has another tokenizer" in capsys.readouterr().err


def test_data_align_shows_every_span_that_differs(root, tmp_path, capsys):
    path = recipe(root, tmp_path, across="spans", objective=GOLD)
    assert main(["data", "align", path, "-n", "2"]) == 0
    shown = capsys.readouterr().out
    assert "tokens are among the teacher's" in shown and "| text before | student | teacher |" in shown
    assert main(["data", "align", path, "-n", "2", "--json", "-"]) == 0
    samples = json.loads(capsys.readouterr().out)
    assert len(samples) == 2
    for sample in samples:
        assert sample["taught"] <= sample["tokens"] and sample["lost"] < sample["taught"]
        assert sample["spans"][-1] == [["<|end|>"], ["<|stop|>"], True]
        for ours, theirs, same in sample["spans"][:-1]:
            assert (ours == theirs) is same
            if all("\\x" not in token for token in ours + theirs):  # a part of a letter
                assert "".join(ours) == "".join(theirs)


def test_a_plan_of_another_tokenizer_reads_no_weight(root):
    section = {"model": str(root / "teacher"), "cross_tokenizer": {"pairing": "spans"}}
    content = {
        "teacher": section, "student": {"model": "s"}, "data": {"sources": [{"path": "t"}]},
        "training": {"output_dir": "o", "batch_size": 1, "max_steps": 1},
    }  # fmt: skip
    plan = plan_teacher(recipe_from(content).teacher)
    assert isinstance(plan, AlignedPlan) and plan.payload == "aligned" and plan.own._loaded is None
