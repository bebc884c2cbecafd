"""The laboratory: whole or not there, gone on with where it was killed, and the same numbers either way."""

from __future__ import annotations

import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("lab")


def test_a_small_laboratory_has_text_models_that_learn_and_teachers_that_are_wrong(
    lab: Any, tmp_path: Path
) -> None:
    models = importlib.import_module("lab_models")
    plan = lab.Plan(
        records=300, heldout=24, vocabulary=320, seeds=1, teacher=models.Course(60, 1e-2, ages=(0.5,)),
        damage=models.Course(40, 1e-2), students={"": models.Course(10, 5e-3)},
    )  # fmt: skip
    lab.make("problems", tmp_path, plan, ["0.05M"], ["0.05M"])
    names = ["student-0.05M-s0", *(f"teacher-0.05M{end}" for end in ("", "-age-50", "-unsure", "-wrong"))]
    found = json.loads((tmp_path / "models.json").read_text())
    assert sorted(found) == names
    held, trained = (
        {one["prompt"] for one in importlib.import_module("lab_text").read(tmp_path / f"{name}.jsonl")}
        for name in ("heldout", "train")
    )
    assert len(held) == 24 and not held & trained
    assert found["teacher-0.05M"]["heldout"] < found["teacher-0.05M-age-50"]["heldout"]
    assert found["teacher-0.05M"]["heldout"] + 0.1 < found["teacher-0.05M-wrong"]["heldout"]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    lab.make("problems", tmp_path, plan, ["0.05M"], ["0.05M"])
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}


@pytest.mark.parametrize("muon", [False, True], ids=["adam", "muon"])
def test_a_training_that_was_killed_ends_at_the_same_weights(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, muon: bool
) -> None:
    models, text = (importlib.import_module(name) for name in ("lab_models", "lab_text"))
    records = [{"prompt": f"{i} + {i}\n", "completion": str(2 * i)} for i in range(60)]
    tokenizer = text.tokenizer_of(records, 300)
    rows, course = models.rows_of(tokenizer, records), models.Course(12, 1e-2, muon=muon)

    def trained(folder: Path) -> Any:
        models.train(
            folder, models.made(models.SIZES["0.05M"], tokenizer, 0), tokenizer, rows, rows[:8], course
        )

    trained(tmp_path / "whole")
    monkeypatch.setattr(models, "SAVE_SECONDS", 0.0)
    calls, heldout_loss = [], models.heldout_loss

    def killed(model: Any, rows: Any) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return heldout_loss(model, rows)

    monkeypatch.setattr(models, "heldout_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "cut")
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.state").exists()
    trained(tmp_path / "cut")
    from safetensors.torch import load_file

    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert not (tmp_path / "cut.state").exists()


def test_wrong_labels_stand_after_the_named_tokens_alone(lab: Any) -> None:
    models = importlib.import_module("lab_models")
    ids = torch.tensor([[5, 1, 2, 5, 3], [1, 1, 5, 4, 0]])
    labels = torch.tensor([[5, 1, 2, 5, 3], [1, 1, 5, 4, -100]])
    seeded = torch.Generator().manual_seed(0)
    sure = models.wrong_after([5], 50, sure=True, seed=1)
    changed = sure(ids, labels, seeded)
    places = (changed != labels).nonzero().tolist()
    assert places == [[0, 1], [0, 4], [1, 3]]
    labels[0, 0] = -100  # the token before is the prompt's
    assert (sure(ids, labels, seeded) != labels).nonzero().tolist() == [[0, 4], [1, 3]]
    labels[0, 0] = 5
    assert torch.equal(changed, sure(ids, labels, seeded))
    unsure = models.wrong_after([5], 50, sure=False, seed=1)
    assert not torch.equal(unsure(ids, labels, seeded), unsure(ids, labels, seeded))


@pytest.mark.parametrize("corpus", ["problems", "code"])
def test_a_teacher_is_wrong_where_the_oracle_says_so_and_at_the_share_that_was_asked_for(
    lab: Any, corpus: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "studies"), *sys.path])
    models, text, oracles = (
        importlib.import_module(name) for name in ("lab_models", "lab_text", "lab_noise")
    )
    records = text.problems(400, 5)
    tokenizer = text.tokenizer_of(records, 320)
    rows = models.rows_of(tokenizer, records, completions_only=corpus in text.DRAWN)
    tokens = models.noisy_tokens(rows, lab.NOISE, seed=7)
    ids, labels = models.padded(rows)
    changed = models.wrong_after(tokens, len(tokenizer), sure=True, seed=7)(ids, labels, torch.Generator())
    learned = labels[:, 1:] != -100
    wrong = (changed != labels)[:, 1:][learned]
    assert float(wrong.float().mean()) == pytest.approx(lab.NOISE, abs=0.01)

    (tmp_path / "noise.json").write_text(json.dumps({"after": tokens}))
    at, of = labels[:, 1:][learned], torch.arange(len(rows))[:, None].expand_as(learned)[learned]
    oracle = oracles.right_places(str(tmp_path / "noise.json"))
    kept = oracle.keep(at.float()[:, None], of)
    first = torch.cat([torch.tensor([True]), of[1:] != of[:-1]])  # without a learned token before it
    assert torch.equal(kept[~first] == 0, wrong[~first]) and not (kept[first] == 0).any()
    if corpus == "problems":
        assert not wrong[first].any()


def test_twins_are_problems_with_their_parts_in_another_order_and_the_same_answer(lab: Any) -> None:
    twin = importlib.import_module("lab_text").twin

    def same(one: str, other: str, answer: str = "4", others: str = "4") -> bool:
        first = {"prompt": one, "answer": answer, "task": "t"}
        return twin(first) == twin({"prompt": other, "answer": others, "task": "t"})

    assert same("gcd of 12 and 8", "gcd of 8 and 12") and same("3*v + 1 = 13", "1 + 3*k = 13")
    assert not same("7 - 3", "3 - 7", "4", "-4") and not same("7 - 3", "7 + 3")


def test_a_problem_is_solved_in_steps_that_end_with_its_answer(lab: Any) -> None:
    text = importlib.import_module("lab_text")
    seen = set()
    for one in text.problems(600, 3):
        steps, _, answer = one["completion"].rpartition(" = ")
        seen.add(one["task"])
        assert (answer or one["completion"]) == one["answer"]
        for product in re.findall(r"(?<!\S)(\d+[*+]\d+)=(\d+)", steps):
            assert eval(product[0]) == int(product[1]), one
        last = steps.split(" ")[-1]
        if one["task"] == "leg_counting":
            assert eval(last) == int(answer)
        if one["task"] == "simple_equations" and "/" in last:
            top, bottom = last.split("/")
            assert int(top) == int(bottom) * int(answer)
        if one["task"] == "gcd":
            remainders = [int(word) for word in steps.split(" ")]
            assert remainders[-1] == 0 and remainders[-2] == int(answer)
        if one["task"] == "spell_backward":
            assert last == answer[-1] and steps.endswith(" ".join(answer))
    assert seen == set(text.TASKS)


def test_a_problem_is_learned_from_its_solution_alone(lab: Any) -> None:
    models, text = (importlib.import_module(name) for name in ("lab_models", "lab_text"))
    records = [{"prompt": "1 + 1\n", "completion": "2"}, {"prompt": "10 + 10\n", "completion": "20"}]
    tokenizer = text.tokenizer_of(records, 300)
    ids, labels = models.padded(models.rows_of(tokenizer, records, completions_only=True))
    learned = [tokenizer.decode(row[row != -100]) for row in labels]
    assert learned == ["2<end>", "20<end>"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    _, whole = models.padded(models.rows_of(tokenizer, records))
    assert tokenizer.decode(whole[1]) == "10 + 10\n20<end>"


def test_the_laboratory_makes_every_teacher_that_a_study_names(lab: Any) -> None:
    studies = "\n".join(path.read_text("utf-8") for path in (ROOT / "studies").glob("*.yaml"))
    named = set(re.findall(r"lab/(\w+)/teacher-([\d.]+M)(-wrong|-unsure)?\b", studies))
    assert {("problems", "0.5M", ""), ("problems", "1M", "-unsure")} <= named
    for corpus, size, damage in named:
        teachers = lab.PLANS[corpus].teachers
        assert size in (teachers[:1] if damage else teachers), f"{corpus}: teacher-{size}{damage}"
