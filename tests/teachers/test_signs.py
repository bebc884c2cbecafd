"""Signs of a pair before training, and the doctor's advice from them: for each kind of teacher, and beyond what was
studied.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.config.load import recipe_from
from selectkd.data.collate import collate
from selectkd.data.supervised import supervised
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import LiveRows
from selectkd.teachers.live import LiveTeacher
from selectkd.teachers.several import SeveralTeacher
from selectkd.training.preflight import advice as table_of
from selectkd.training.preflight.advice import HeldBack, Rule, Table, advice
from selectkd.training.preflight.doctor import Finding, doctor
from selectkd.training.preflight.signs import Signs, signs_of, signs_of_rows
from training.tiny import texts, tiny_llama

GATE = {"verifier": "greedy_topk", "k": 5, "beta": 0.01}
HELD = HeldBack(pairs=20, teachers=5, plain=15, by_sign=18, helped=5, found=4)
SIGNS = Signs(
    900, tar=0.5, overlap=0.4, kl=2.0, teacher_entropy=1.0, student_entropy=3.0, surprise=0.7, lead=0.9
)


def plainly(
    p: torch.Tensor, q: torch.Tensor, labels: torch.Tensor, sequence: torch.Tensor
) -> dict[str, float]:
    """The signs by their words, from two distributions [n, v]."""
    best = q.argmax(-1)
    rank = (p > p.gather(1, best[:, None])).sum(-1)
    entropies = {name: -(x * x.log()).sum(-1).mean() for name, x in (("teacher", p), ("student", q))}
    found = {
        "tar": torch.stack([(rank < 5)[sequence == one].double().mean() for one in sequence.unique()]).mean(),
        "overlap": torch.minimum(p, q).sum(-1).mean(),
        "kl": (p * (p / q).log()).sum(-1).mean(),
        "teacher_entropy": entropies["teacher"],
        "student_entropy": entropies["student"],
        "surprise": -p.gather(1, labels[:, None]).log().mean() - entropies["teacher"],
        "lead": (p.gather(1, labels[:, None]) / q.gather(1, labels[:, None])).log().mean(),
    }
    return {name: float(value) for name, value in found.items()}


def probs_of(model: Any, batch: Any) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return logits.flatten(0, 1)[supervised(batch).position].softmax(-1)


def test_signs_equal_their_words_in_float64_for_one_teacher_and_for_an_average() -> None:
    """More rows than a chunk has."""
    student, *models = (tiny_llama(seed, dtype=torch.float64).eval() for seed in (2, 3, 4))
    batch = collate(texts(20), pad_id=0)
    labels, sequence = supervised(batch).labels, supervised(batch).sequence
    assert len(labels) > 100
    p, other, q = (probs_of(model, batch) for model in (*models, student))
    student.train()
    one = signs_of(student, LiveTeacher(models[0]), batch)
    assert one is not None and one.agreement is None and one.rows == len(labels) and student.training
    for name, value in plainly(p, q, labels, sequence).items():
        assert getattr(one, name) == pytest.approx(value, abs=1e-9), name

    models = [model.float() for model in models]  # an average is formed in fp32
    both = SeveralTeacher([LiveTeacher(model) for model in models], [3.0, 1.0])
    found = signs_of(student, both, batch)
    assert found is not None
    assert found.agreement == pytest.approx(float(torch.minimum(p, other).sum(-1).mean()), abs=1e-5)
    for name, value in plainly(0.75 * p + 0.25 * other, q, labels, sequence).items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-5), name

    routed = SeveralTeacher([LiveTeacher(model) for model in models], streams=[0, 1])
    apart = signs_of(student, routed, batch)
    assert apart is not None and apart.agreement is None  # no row has two teachers


def test_a_teachers_rows_that_are_not_finite_and_ids_it_lacks_are_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, teacher = (torch.randn(70, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    head, wider = (torch.randn(v, 8, generator=generator, dtype=torch.float64) for v in (20, 24))
    labels = torch.randint(20, (70,), generator=generator)
    p, q = (teacher @ wider[:20].T).softmax(-1), (hidden @ head.T).softmax(-1)
    sequence = torch.arange(70) // 30
    expected = plainly(p[1:], q[1:], labels[1:], sequence[1:])
    teacher[0] = torch.nan
    found = signs_of_rows(hidden, Head(head), LiveRows(teacher, wider), labels, sequence)
    assert found.rows == 69
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, abs=1e-9), name


def pair_of(signs: Signs, **changes: Any) -> dict[str, Any]:
    pair = {
        "study": "ages",
        "gate": GATE,
        "seen": "no difference",
        "parameters": 1000,
        "signs": signs.as_dict(),
    }
    return {**pair, **changes}


def studied(rule: Rule, held: HeldBack = HELD) -> Table:
    """Pairs whose signs are those of SIGNS, more or less by half."""
    numbers = {name: value for name, value in SIGNS.as_dict().items() if value is not None and name != "rows"}
    low, high = (replace(SIGNS, **{k: by * v for k, v in numbers.items()}) for by in (0.5, 1.5))
    return Table(rule, held, [pair_of(low), pair_of(high, study="sizes", seen="helps"), pair_of(SIGNS)])


def test_the_advice_is_in_a_recipes_words_with_what_it_rests_on_and_its_error() -> None:
    rule = Rule("surprise", True, 0.6, None, GATE)
    told = advice(SIGNS, 1000, studied(rule))
    assert "Advised: method: kd with selection: {verifier: greedy_topk, k: 5, beta: 0.01}, since" in told
    assert "3 studied pairs" in told and "(ages, sizes; docs/results.md" in told
    assert "better in 1, worse in 0, and no difference was seen in 2" in told
    assert (
        "right on 18 of 20 pairs (90%), plain distillation on 15; of 5 pairs" in told and "foretold 4" in told
    )
    assert "outside" not in told and "study compare" not in told
    below = advice(replace(SIGNS, surprise=0.5), 1000, studied(rule))
    assert "Advised: method: kd, plain distillation, since the surprise" in below
    recipe = {"method": "kd", "selection": GATE, "teacher": {"model": "t"}, "student": {"model": "s"}}
    rest = {
        "data": {"sources": [{"path": "a"}]},
        "training": {"output_dir": "r", "max_steps": 1, "batch_size": 1},
    }
    assert recipe_from({**recipe, **rest}).objective.beta == 0.01  # what is advised is a recipe


@pytest.mark.parametrize("table", [None, studied(Rule())], ids=["no table", "a table"])
def test_a_teacher_that_knows_the_text_worse_than_the_student_is_told_of(table: Table | None) -> None:
    told = advice(replace(SIGNS, lead=-0.25), 1000, table)
    assert "better than its teacher does, by 0.25 nats" in told and "make the student worse" in told
    assert "make the student worse" not in advice(SIGNS, 1000, table)


def test_where_no_sign_foretells_help_the_advice_says_so() -> None:
    told = advice(SIGNS, 1000, studied(Rule(), replace(HELD, by_sign=14)))
    assert "Advised: method: kd, plain distillation. " in told
    assert "plain distillation was right on 15 of 20 pairs (75%), the best rule by a sign on 14" in told
    assert "do not foretell where a gate helps. That is too seldom" in told and "study compare" in told
    often = advice(SIGNS, 1000, studied(Rule(), replace(HELD, plain=19, helped=1)))
    assert "right on 19 of 20 pairs (95%)" in often and "study compare" not in often
    assert "not known" in advice(SIGNS, 1000, studied(Rule(), HeldBack(0, 1, 0, 0, 0, 0)))


def test_signs_and_sizes_that_were_not_studied_are_named() -> None:
    far = replace(SIGNS, kl=9.0, tar=0.1, agreement=0.9)
    told = advice(far, 7_000_000_000, studied(Rule()))
    assert "This pair lies outside of the studied ones" in told
    assert (
        "KL 9 (1 to 3)" in told
        and "TAR 0.1 (0.25 to 0.75)" in told
        and "overlap 0.4" not in told.split("outside")[1]
    )
    assert "several teachers" in told and "7,000,000,000 parameters (1,000 to 1,000)" in told


@pytest.fixture
def finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Finding]:
    """The doctor's finding on the gate of a recipe, by a table of our own."""
    studied(Rule("surprise", True, -99.0, None, GATE)).write(tmp_path / "advice.jsonl")
    table = Table.read(tmp_path / "advice.jsonl")
    monkeypatch.setattr(table_of.Table, "read", lambda: table)

    def found(path: str) -> Finding:
        every = {one.check: one for one in doctor(load_recipe(path, []), device="cpu")}
        assert not [one for one in every.values() if not one.ok]
        tar = re.search(r"k = 5: (\d\.\d+)", every["tar"].message)
        assert tar is not None and every["gate"].message.startswith(("whether", f"TAR {tar[1]} "))
        return every["gate"]

    return found


def test_the_doctor_advises_for_a_teacher_in_memory_and_alike_from_a_cache_of_it(
    recipe: Callable[..., str], pair: Path, tmp_path: Path, finding: Callable[[str], Finding]
) -> None:
    model = str(pair / "teacher")
    live = finding(recipe({"model": model}, run="live"))
    assert (
        live.message.startswith("TAR 0.") and "Advised: method: kd with selection: {verifier" in live.message
    )
    stored = {"cache": str(tmp_path / "cache"), "model": model, "payload": "hidden", "precision": "float32"}
    assert main(["cache", "build", recipe(stored, run="build")]) == 0
    assert finding(recipe({"cache": str(tmp_path / "cache")}, run="cached")) == live


def test_the_doctor_asks_for_whole_distributions_where_a_teacher_gives_its_best_tokens(
    recipe: Callable[..., str], pair: Path, tmp_path: Path, finding: Callable[[str], Finding]
) -> None:
    stored = {"cache": str(tmp_path / "few"), "model": str(pair / "teacher"), "payload": "top_k", "k": 10}
    assert main(["cache", "build", recipe(stored, run="build")]) == 0
    told = finding(recipe({"cache": str(tmp_path / "few")}, run="run")).message
    assert "payload: hidden" in told and "Advised" not in told


def test_the_doctor_says_how_far_several_teachers_agree(
    recipe: Callable[..., str], pair: Path, finding: Callable[[str], Finding]
) -> None:
    model = str(pair / "teacher")
    told = finding(recipe([{"model": model, "weight": 1.0}, {"model": model, "weight": 2.0}])).message  # type: ignore[arg-type]
    assert "overlap of the teachers 1.000" in told and "several teachers, where all studied" in told


def test_a_recipe_that_follows_no_probe_is_examined_too(
    recipe: Callable[..., str], pair: Path, finding: Callable[[str], Finding]
) -> None:
    path = Path(recipe({"model": str(pair / "teacher")}))
    path.write_text(
        path.read_text("utf-8").replace("training:\n", "training:\n  probe_samples: 0\n"), "utf-8"
    )
    assert "Advised" in finding(str(path)).message


def test_without_a_table_of_pairs_the_signs_stand_alone(tmp_path: Path) -> None:
    assert Table.read(tmp_path / "none.jsonl") is None
    told = advice(SIGNS, 1000, None)
    assert told.startswith("TAR 0.500") and "no gate is advised" in told
