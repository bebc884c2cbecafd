"""Advice from studies: pairs are found in study files, and a rule is judged by teachers held back from choosing it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.evals.studies.rows import append_row
from selectkd.training.preflight.advice import WORDS, HeldBack, Rule, Table
from training.tiny import recipe_of, tiny_llama, write_pair

ROOT = Path(__file__).parents[2]
GREEDY = {"verifier": "greedy_topk", "k": 5, "beta": 0.01}
OTHER = {"verifier": "teacher_entropy", "max": 1.0, "beta": 0.01}


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return importlib.import_module("advice")


def pair(teacher: str, seen: str, gate: dict[str, Any] = GREEDY, **signs: float) -> dict[str, Any]:
    worth = {"helps": -0.2, "hurts": 0.2, "no difference": 0.0}[seen]
    return {
        "study": "s", "teacher": teacher, "gate": gate, "seen": seen, "signs": {**dict.fromkeys(WORDS, 1.0), **signs},
        "differences": {"held_out_loss": {"value": worth}}, "parameters": 1,
    }  # fmt: skip


def planted(surprises: dict[str, float], least: float) -> list[dict[str, Any]]:
    """One pair a teacher, helped where the teacher's surprise is at least this."""
    return [pair(name, "helps" if x >= least else "hurts", surprise=x) for name, x in surprises.items()]


def test_a_sign_that_tells_is_found_and_is_right_about_teachers_held_back(program: Any) -> None:
    pairs = planted({"a": 0.0, "b": 0.1, "c": 0.2, "d": 1.0, "e": 1.2, "f": 1.4}, 0.5)
    table = program.Fit(pairs).table
    assert (table.rule.sign, table.rule.above, table.rule.advised) == ("surprise", True, GREEDY)
    assert 0.2 < table.rule.threshold <= 1.0
    assert table.held_back == HeldBack(pairs=6, teachers=6, plain=3, by_sign=6, helped=3, found=3)
    assert table.right == 6 and "helps where the surprise of the teacher" in table.rule.sentence


def test_the_rule_that_judges_a_teacher_has_not_seen_it(program: Any) -> None:
    """c is helped, and lies nearer to those that are not: a rule that has seen c sets its threshold below, one that has
    not lies above.
    """
    pairs = planted({"a": 0.0, "b": 0.05, "b2": 0.1, "c": 1.0, "d": 2.0, "e": 2.1, "f": 2.2}, 0.5)
    assert program.counted(program.fitted(pairs), pairs) == (7, 4, 4)
    held = program.Fit(pairs).held_back
    assert (held.by_sign, held.plain, held.helped, held.found) == (6, 3, 4, 3)


def test_a_rule_is_chosen_by_teachers_left_out_of_its_threshold(program: Any) -> None:
    """Help goes up and down with the sign: some threshold is right on four of six, and on none that it has not seen."""
    seen = ["helps", "hurts"] * 3
    pairs = [pair(str(x), how, surprise=float(x)) for x, how in enumerate(seen)]
    assert program.counted(program.Family("surprise", False, None).best(pairs), pairs)[0] == 4
    assert program.fitted(pairs) == Rule()
    table = program.Fit(pairs).table
    assert table.rule == Rule() and table.right == table.held_back.plain == 3


def test_a_rule_that_is_no_better_on_teachers_held_back_is_not_taken(program: Any) -> None:
    """Of two teachers that are helped one is too few to choose the rule by, when the other is held back."""
    pairs = planted({"a": 0.0, "b": 0.1, "c": 2.0, "d": 2.1}, 0.5)
    assert program.fitted(pairs).sign == "surprise"
    table = program.Fit(pairs).table
    assert (table.held_back.by_sign, table.held_back.plain, table.rule) == (2, 2, Rule())


def test_all_pairs_of_a_teacher_are_held_back_together(program: Any) -> None:
    """Of 8 pairs 4 are of one teacher that alone is helped: nothing that the others show foretells it."""
    pairs = [pair("odd", "helps", surprise=9.0) for _ in range(4)]
    pairs += [pair(name, "hurts", surprise=float(i)) for i, name in enumerate("abcd")]
    held = program.Fit(pairs).held_back
    assert (held.pairs, held.teachers, held.helped, held.found) == (8, 5, 4, 0)
    assert held.by_sign <= held.plain == 4


def test_copies_of_a_teacher_are_held_back_with_it(program: Any) -> None:
    """A teacher's younger and damaged copies are alike: one must not foretell the other."""
    names = ["lab/t", "lab/t-age-12", "lab/t-wrong", "lab/t-unsure"]
    pairs = [pair(name, "helps", surprise=9.0) for name in names]
    pairs += [pair(name, "hurts", surprise=float(i)) for i, name in enumerate("abcd")]
    held = program.Fit(pairs).held_back
    assert (held.teachers, held.helped, held.found) == (5, 4, 0)


def test_plain_distillation_is_the_rule_where_no_gate_helps_and_where_there_are_two_teachers(
    program: Any,
) -> None:
    none = [pair(name, "no difference", surprise=i / 3) for i, name in enumerate("abcd")]
    assert program.Fit(none).table.rule == Rule() and program.Fit(none).held_back.plain == 4
    few = program.Fit(planted({"a": 0.0, "b": 1.0}, 0.5)).table
    assert few.rule == Rule() and few.held_back.pairs == 0


def test_a_rule_may_speak_of_one_gate(program: Any) -> None:
    pairs = planted({"a": 0.0, "b": 0.1, "c": 0.2, "d": 1.0, "e": 1.2, "f": 1.4}, 0.5)
    pairs += [pair(one["teacher"], "hurts", OTHER, **one["signs"]) for one in pairs]
    table = program.Fit(pairs).table
    assert table.rule.gate == table.rule.advised == GREEDY and table.held_back.by_sign == 12
    assert not table.rule.expects_help({"surprise": 2.0}, OTHER)


def test_a_gate_helps_where_the_whole_interval_is_on_its_side(program: Any) -> None:
    intervals = [(-0.3, -0.1), (-0.3, 0.1), (0.1, 0.3)]
    by_loss = [program.seen({"low": low, "high": high}, "held_out_loss") for low, high in intervals]
    assert by_loss == ["helps", "no difference", "hurts"]
    assert program.seen({"low": 0.1, "high": 0.3}, "draft_acceptance") == "helps"


def test_pairs_come_from_the_arms_that_differ_by_a_gate_alone(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    (tmp_path / "other").mkdir()
    tiny_llama(5).save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((tmp_path / "teacher" / name).read_bytes())
    training = {
        "max_steps": 3,
        "batch_size": 3,
        "max_length": 24,
        "max_prompt_length": 12,
        "probe_samples": 0,
    }
    falling = {**GREEDY, "beta": {"start": 1.0, "end": 0.01, "steps": 3}}
    other, gone = ({"teacher": {"model": str(tmp_path / name)}} for name in ("other", "gone"))
    arms = {
        "kd": {"method": "kd"},
        "greedy": {"method": "kd", "selection": GREEDY},
        "falling": {"method": "kd", "selection": falling},
        "ranked": {"method": "kd", "selection": {"selector": "se_kd", "beta": 0.0}},
        "two_gates": {
            "method": "kd",
            "selection": {"verifier": {"name": "greedy_topk", "k": 5}, "selector": {"name": "se_kd"}},
        },
        "reverse": {"method": "kd", "selection": GREEDY, "objective": {"divergence": "reverse_kl"}},
        "kd_other": {"method": "kd", **other},
        "greedy_other": {"method": "kd", "selection": GREEDY, **other},
        "kd_gone": {"method": "kd", **gone},
        "greedy_gone": {"method": "kd", "selection": GREEDY, **gone},
        "not_run": {"method": "kd", "selection": {**GREEDY, "k": 1}},
    }
    study = {
        "question": "q", "statement": "s", "arms": arms, "seeds": [1, 2, 3], "outcome": "held_out_loss",
        "recipe": {**recipe_of(tmp_path, data={"evaluation": 0.25}), "training": training},
    }  # fmt: skip
    for name in ("first", "again"):  # the same trainings in two studies are one pair each
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(study, sort_keys=False), "utf-8")
        for arm in arms:
            for seed in study["seeds"] if arm != "not_run" else ():
                loss = {"greedy": 2.0, "ranked": 4.0, "greedy_other": 3.0}.get(arm, 3.0) + 0.01 * seed
                loss += 0.02 * (arm == "greedy_other") * (-1) ** seed
                row = {
                    "arm": arm,
                    "seed": seed,
                    "learning_rate": None,
                    "held_out_loss": loss,
                    "held_out_kl": 1.0,
                }
                append_row(tmp_path / f"{name}.jsonl", row)
    pairs, left = program.pairs_of(tmp_path)
    known = {**pairs[0], "plain": "kd_gone", "gated": "greedy_gone", "parameters": 7}
    kept = program.pairs_of(tmp_path, [known])[0][
        -1
    ]  # the models are gone, their signs are in an older table
    assert (kept["plain"], kept["parameters"], kept["signs"]) == ("kd_gone", 7, known["signs"])
    assert [(one["plain"], one["gated"], one["seen"]) for one in pairs] == [
        ("kd", "greedy", "helps"),
        ("kd", "falling", "no difference"),
        ("kd", "ranked", "hurts"),
        ("kd_other", "greedy_other", "no difference"),
    ]
    assert pairs[0]["gate"] == GREEDY and pairs[1]["gate"] == falling and pairs[0]["study"] == "again"
    assert pairs[0]["signs"] == pairs[1]["signs"] != pairs[3]["signs"]
    difference = pairs[0]["differences"]["held_out_loss"]
    assert difference["value"] == pytest.approx(-1.0) and difference["n"] == 3 == pairs[0]["seeds"]
    assert any("gone is not there" in one for one in left) and any("not_run" in one for one in left)

    monkeypatch.setattr(program, "TABLE", tmp_path / "advice.jsonl")
    assert program.main(["--studies", str(tmp_path), "--write"]) == 0
    table = Table.read(tmp_path / "advice.jsonl")
    assert table is not None and table.pairs == json.loads(json.dumps(pairs)) and table.rule == Rule()
    assert "plain distillation" in capsys.readouterr().out


def test_models_that_the_rows_are_not_of_are_refused(
    program: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    training = {"max_steps": 3, "batch_size": 3, "max_length": 24, "max_prompt_length": 12, "output_dir": "r"}
    recipe = {**recipe_of(tmp_path, data={"evaluation": 0.25}), "method": "kd", "training": training}
    checked = program.recipe_from(recipe)
    signs, parameters = program.signs_before(checked, None)
    assert signs.kl > 0 and parameters > 1000
    with pytest.raises(program.ConfigError, match="they are others"):
        program.signs_before(checked, 2 * signs.kl)


def test_the_table_that_ships_has_the_rule_that_its_pairs_give(program: Any) -> None:
    table = Table.read()
    if table is not None:
        made = program.Fit(table.pairs).table
        assert (made.rule, made.held_back) == (table.rule, table.held_back)
