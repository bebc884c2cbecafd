"""A study: learning rates on a seed of their own, controls at the gate's rate, rows that outlive a kill, verdicts."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.cli.app import main
from selectkd.config.study import load_study
from selectkd.errors import ConfigError
from selectkd.evals.studies.measures import MEASURES
from selectkd.evals.studies.one_run import measured
from selectkd.evals.studies.rows import append_row, read_rows
from selectkd.evals.studies.study import (
    Job,
    arms_of,
    check_names,
    chosen_rates,
    files_read,
    planned,
    rate_for,
    run_study,
    values_of,
)  # fmt: skip
from training.tiny import recipe_of, tiny_llama, write_pair

MEASURED = {
    "exact_match",
    "parse_rate",
    "calibration_error",
    "draft_acceptance",
    "draft_speedup",
    "top_eigenvalue",
    "flips",
    "nondecreasing_share",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("study")
    write_pair(root, tiny_llama(1, layers=3))
    return root


def study_of(root: Path, **changes: Any) -> dict[str, Any]:
    training = {
        "max_steps": 3, "batch_size": 3, "max_length": 24, "max_prompt_length": 12, "probe_samples": 0,
        "evaluate_every": 1,
    }  # fmt: skip
    return {
        "question": "Does the gate help?",
        "statement": "It does where its interval lies below plain distillation's.",
        "recipe": {**recipe_of(root, data={"evaluation": 0.25}), "training": training},
        "arms": {
            "kd": {"method": "kd"},
            "gated": {"method": "kd", "selection": {"verifier": "greedy_topk", "k": 5, "beta": 0.01}},
        },
        "seeds": [1],
        **changes,
    }


def written(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def test_a_study_tunes_each_arm_runs_its_controls_and_runs_nothing_twice(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = study_of(
        root, controls=["matched_random", "matched_position"], learning_rates=[1e-3, 1e-2],
        measures=["calibration"], claims=[{"first": "kd", "second": "gated", "expected": "higher"}],
    )  # fmt: skip
    file = written(tmp_path / "first.yaml", content)
    command = ["study", "run", str(file), "--runs", str(tmp_path / "runs"), "--workers", "2"]
    assert main(command) == 0
    rows = read_rows(tmp_path / "first.jsonl")
    study = load_study(file)
    names = ["kd", "gated", "gated/matched_random", "gated/matched_position"]
    assert [arm.name for arm in arms_of(study)] == names
    chosen = chosen_rates(study, rows)
    assert set(rows) == {(arm, 0, rate) for arm in names for rate in (1e-3, 1e-2)} | {
        (arm, 1, chosen[arm]) for arm in names
    }
    for arm in names:  # the better one on the tuning seed
        tried = {rate: rows[arm, 0, rate]["held_out_kl"] for rate in (1e-3, 1e-2)}
        assert chosen[arm] == min(tried, key=tried.__getitem__)
    final = {arm: rows[arm, 1, chosen[arm]] for arm in names}
    for row in final.values():
        assert row.keys() >= {"calibration_error", "held_out_kl", "held_out_loss", "tar", "overlap"}
        assert [look[0] for look in row["curve"]] == [0, 1, 2, 3]
    random, gated = final["gated/matched_random"], final["gated"]
    # 3 steps of 3 sequences of 8 tokens: within four standard deviations of a fair draw at the gate's rate
    rate = gated["acceptance"]
    assert abs(random["acceptance"] - rate) <= 4 * (rate * (1 - rate) / 72) ** 0.5
    assert final["gated/matched_position"]["acceptance"] == pytest.approx(rate, abs=0.3)
    assert not list((tmp_path / "runs").rglob("student"))

    before = (tmp_path / "first.jsonl").read_bytes()
    assert main(command) == 0
    assert (tmp_path / "first.jsonl").read_bytes() == before

    assert main([*command, "--background"]) == 0  # there is nothing left to run: it ends at once
    log = tmp_path / "first.log"
    for _ in range(600):
        if "holds the rows" in log.read_text("utf-8"):
            break
        time.sleep(0.2)
    assert "12 runs, 12 done, 0 to go" in log.read_text("utf-8")
    assert (tmp_path / "first.jsonl").read_bytes() == before

    page = tmp_path / "results.md"
    figures = tmp_path / "figures"
    figures.mkdir()
    assert main(["study", "results", str(file), "--markdown", str(page), "--figures", str(figures)]) == 0
    text = page.read_text("utf-8")
    assert "**not run**: held-out KL of gated higher than kd" in text and "(one seed)" in text
    assert "| gated/matched_position |" in text and "![first](figures/study-first.svg)" in text
    assert "held-out KL (nats)" in (figures / "study-first.svg").read_text(
        "utf-8"
    )  # the arms' curves are drawn
    capsys.readouterr()


def test_every_measure_is_in_the_row_of_a_run(root: Path, tmp_path: Path) -> None:
    """But of drawn scenes, which need a student that sees images: tests/vision/test_pair.py."""
    names = [name for name in MEASURES if name != "vision"]
    content = study_of(root, measures=names)
    content["recipe"]["training"]["probe_samples"] = 4
    study = load_study(written(tmp_path / "all.yaml", content))
    values = values_of(study, Job(arms_of(study)[0], 1, 1e-2), None)
    row = measured(values, tmp_path / "run", measures=study.asked())
    assert row.keys() >= MEASURED and row["draft_exact"] == 1


def test_a_study_fills_the_caches_that_its_teachers_name_and_still_measures_with_the_teacher_itself(
    root: Path, tmp_path: Path
) -> None:
    content = study_of(root, measures=["draft", "sharpness"])
    model, folder = content["recipe"]["teacher"]["model"], tmp_path / "cache"
    content["recipe"]["teacher"] = {"cache": str(folder), "model": model, "precision": "float32"}
    file = written(tmp_path / "cached.yaml", content)
    command = ["study", "run", str(file), "--runs", str(tmp_path / "runs")]
    assert main(command) == 0
    assert (folder / "index.json").is_file()
    rows = read_rows(tmp_path / "cached.jsonl")
    live = study_of(root, measures=["draft", "sharpness"])
    assert main([*command[:2], str(written(tmp_path / "live.yaml", live)), *command[3:]]) == 0
    for key, row in read_rows(tmp_path / "live.jsonl").items():
        assert rows[key]["held_out_kl"] == pytest.approx(row["held_out_kl"], rel=1e-4)
        assert rows[key]["top_eigenvalue"] == pytest.approx(row["top_eigenvalue"], rel=1e-2)

    other = {"teacher": {"cache": str(folder), "model": "another", "precision": "float32"}}
    content["arms"]["other"] = other
    with pytest.raises(ConfigError, match=r"arms.other: teacher.cache .* belongs to another teacher"):
        load_study(written(tmp_path / "both.yaml", content)).caches()
    del content["recipe"]["teacher"]["model"]
    del content["arms"]["other"]
    file = written(tmp_path / "unnamed.yaml", content)
    assert main([*command[:2], str(file), *command[3:]]) == 0
    error = read_rows(tmp_path / "unnamed.jsonl")["kd", 1, None]["error"]
    assert "draft needs the teacher itself" in error and "name the model beside the cache" in error


def test_a_measure_loads_the_teacher_as_its_cache_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    from torch import nn

    from selectkd.config.teachers import CacheTeacher
    from selectkd.evals.studies import measures

    asked: dict[str, Any] = {}

    def load(model: str, **named: Any) -> Any:
        asked.update(named, model=model)
        return SimpleNamespace(on=lambda device: SimpleNamespace(model=nn.Linear(1, 1)))

    monkeypatch.setattr(measures, "load_model", load)
    wanted = {"model": "a/b", "revision": "v2", "dtype": "bfloat16", "quantization": "bitsandbytes-8bit",
              "attn_implementation": "eager"}  # fmt: skip
    recipe = SimpleNamespace(teacher=CacheTeacher.model_validate({"cache": "c", **wanted}))
    measures._teacher_model(SimpleNamespace(teacher=None, student=nn.Linear(1, 1)), recipe, "draft")
    assert asked == wanted


def test_a_run_that_failed_is_run_again_and_one_of_another_recipe_too(root: Path, tmp_path: Path) -> None:
    content = study_of(root, arms={"one": {"method": "kd"}, "bad": {"training": {"learning_rate": 1e30}}})
    content["recipe"]["training"] |= {"max_steps": 6}
    file = written(tmp_path / "two.yaml", content)
    command = ["study", "run", str(file), "--runs", str(tmp_path / "runs")]
    assert main(command) == 0
    rows = read_rows(tmp_path / "two.jsonl")
    assert rows["bad", 1, None]["error"] and "error" not in rows["one", 1, None]
    content["arms"]["bad"] = {"training": {"learning_rate": 1e-3}}
    content["arms"]["one"] = {"method": "akl"}
    assert main([*command[:2], str(written(file, content)), *command[3:]]) == 0
    again = read_rows(tmp_path / "two.jsonl")
    assert "error" not in again["bad", 1, None]
    assert again["one", 1, None]["recipe"] != rows["one", 1, None]["recipe"]


def test_a_row_of_models_or_text_that_were_made_again_is_run_again(tmp_path: Path) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    study = load_study(written(tmp_path / "one.yaml", study_of(tmp_path, arms={"one": {"method": "kd"}})))
    values = study.values("one", 1)
    first = files_read(values)
    assert run_study(study, tmp_path / "one.jsonl", tmp_path / "runs")["one", 1, None]["files"] == first
    lines = (tmp_path / "one.jsonl").read_text().splitlines()
    run_study(study, tmp_path / "one.jsonl", tmp_path / "runs")
    assert (tmp_path / "one.jsonl").read_text().splitlines() == lines

    tiny_llama(9, layers=3).save_pretrained(tmp_path / "teacher")
    second = files_read(values)
    assert second != first
    run_study(study, tmp_path / "one.jsonl", tmp_path / "runs")
    assert read_rows(tmp_path / "one.jsonl")["one", 1, None]["files"] == second
    assert len((tmp_path / "one.jsonl").read_text().splitlines()) == 2

    rows = read_rows(tmp_path / "one.jsonl")
    assert planned(study, rows)[:2] == (1, 1)
    source = Path(values["data"]["sources"][0]["path"])
    source.write_text(source.read_text() + source.read_text().splitlines()[0] + "\n")
    assert files_read(values) not in (first, second)
    assert planned(study, rows)[:2] == (1, 0)

    (tmp_path / "teacher").rename(tmp_path / "away")
    lines = (tmp_path / "one.jsonl").read_bytes()
    assert planned(study, rows)[:2] == (1, 1)  # nothing is there to compare the row with
    study.recipe["training"]["max_steps"] = 2
    with pytest.raises(ConfigError, match="is not there"):
        run_study(study, tmp_path / "one.jsonl", tmp_path / "runs")
    assert (tmp_path / "one.jsonl").read_bytes() == lines


def test_a_line_that_a_kill_cut_off_counts_as_not_written_and_leaves_the_others(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    first, second = ({"arm": "a", "seed": seed, "learning_rate": None, "x": seed} for seed in (1, 2))
    append_row(file, first)
    with file.open("a") as out:
        out.write('{"arm": "b", "seed": 7, "lea')
    assert list(read_rows(file)) == [("a", 1, None)]
    append_row(file, second)
    assert [json.loads(line) for line in file.read_text().splitlines()] == [first, second]
    file.write_text('{"arm": "a"}\n')
    with pytest.raises(ConfigError, match=r"rows.jsonl:1: no row of a study"):
        read_rows(file)


def test_a_study_that_cannot_be_is_refused_with_its_line(root: Path, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        file = written(tmp_path / "wrong.yaml", study_of(root, **changes))
        with pytest.raises(ConfigError, match=match):
            load_study(file)

    claim = {"first": "kd", "second": "gatd", "expected": "lower"}
    refused("'gatd', which is none. Did you mean 'gated'", claims=[claim])
    refused("needs within", claims=[{**claim, "second": "gated", "expected": "same"}])
    refused("is one of the seeds", learning_rates=[1e-3], tuning_seed=1)
    refused("names a seed twice", seeds=[1, 1])
    refused(r"wrong.yaml:\d+: arms.bad: .*method = 'kdd' is no method", arms={"bad": {"method": "kdd"}})
    refused("is not a key", statment="x")
    with pytest.raises(ConfigError, match="there is no study"):
        load_study(tmp_path / "none.yaml")


def test_a_seed_stands_in_every_text_of_a_recipe_that_names_it(root: Path, tmp_path: Path) -> None:
    content = study_of(root)
    content["recipe"]["student"] = {"model": "students/s{seed}"}
    study = load_study(written(tmp_path / "seeded.yaml", content))
    job = Job(arms_of(study)[0], 7, 1e-3)
    values = values_of(study, job, None)
    assert values["student"]["model"] == "students/s7"
    assert values["training"]["seed"] == 7 and values["training"]["learning_rate"] == 1e-3


def test_a_control_keeps_the_arms_loss_and_beta_and_changes_its_gate_alone(
    root: Path, tmp_path: Path
) -> None:
    gate = {"verifier": "expected_spec_k", "k": 2, "beta": 0.1}
    arms = {
        "gated": {"method": "gkd", "selection": gate},
        "ranked": {"method": "kd", "objective": {"selector": "tip", "beta": 0.0}},
    }
    study = load_study(
        written(
            tmp_path / "c.yaml", study_of(root, arms=arms, controls=["matched_random", "matched_position"])
        )
    )
    found = {arm.name: arm for arm in arms_of(study)}
    assert set(found) == {*arms, "gated/matched_random", "gated/matched_position", "ranked/matched_random"}
    from selectkd.config import recipe_from

    random = recipe_from(values_of(study, Job(found["gated/matched_random"], 1, None), 0.25)).objective
    assert random.verifier == {"name": "matched_random", "rate": 0.25} and random.beta == 0.1
    assert random.divergence == {"name": "generalized_jsd", "beta": 0.5}
    position = recipe_from(values_of(study, Job(found["gated/matched_position"], 1, None), None)).objective
    assert position.verifier == {"name": "matched_position", "of": {"name": "expected_spec_k", "k": 2}}
    ranked = recipe_from(values_of(study, Job(found["ranked/matched_random"], 1, None), 0.5)).objective
    assert ranked.selector is None and ranked.gate == {"name": "matched_random", "rate": 0.5}


def test_a_gate_whose_weights_exceed_one_has_its_weights_dealt_out_for_a_control(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"weighed": {"method": "kd", "selection": {"verifier": "iw_opd", "gamma": 0.5, "beta": 0.0}}}
    content = study_of(root, arms=arms, controls=["matched_random", "matched_position"])
    file = written(tmp_path / "w.yaml", content)
    assert main(["study", "run", str(file), "--runs", str(tmp_path / "runs")]) == 0
    rows = read_rows(tmp_path / "w.jsonl")
    assert {key[0] for key in rows} == {"weighed", "weighed/matched_shuffle"}
    gated, control = (rows[name, 1, None] for name in ("weighed", "weighed/matched_shuffle"))
    assert gated["acceptance"] > 1.0 and "error" not in control
    # the first step's rows are the same ones; from the second on the students differ a little
    assert control["acceptance"] == pytest.approx(gated["acceptance"], rel=0.02)
    claim = {"first": "weighed/matched_random", "second": "weighed", "expected": "lower"}
    study = load_study(written(file, {**content, "claims": [claim]}))
    with pytest.raises(ConfigError, match=r"'weighed/matched_random'.*It has: weighed/matched_shuffle"):
        check_names(study)
    check_names(
        load_study(
            written(file, {**content, "claims": [{**claim, "first": claim["first"][:8] + "matched_shuffle"}]})
        )
    )
    capsys.readouterr()


def test_a_control_accepts_as_many_as_its_gate_where_some_tokens_are_always_accepted(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A third of the words are always accepted, and the gate rejects nearly all others."""
    objective = {"always_accept": list(range(4, 24))}
    arms = {
        "gated": {"method": "kd", "objective": objective, "selection": {"verifier": "greedy_topk", "k": 1}}
    }
    content = study_of(root, arms=arms, controls=["matched_random"])
    content["recipe"]["training"] |= {"max_steps": 24, "learning_rate": 1e-6}
    file = written(tmp_path / "always.yaml", content)
    assert main(["study", "run", str(file), "--runs", str(tmp_path / "runs")]) == 0
    rows = read_rows(tmp_path / "always.jsonl")
    gated, control = rows["gated", 1, None], rows["gated/matched_random", 1, None]
    share, tokens = gated["always_accepted"], gated["tokens"]
    assert 0.15 < share < 0.6 and control["always_accepted"] == share < gated["acceptance"] < 1.0
    rate = rate_for(load_study(file), rows, Job(arms_of(load_study(file))[1], 1, None))
    assert rate == pytest.approx((gated["acceptance"] - share) / (1 - share))
    # within four standard deviations of fair draws for the other tokens
    spread = ((1 - share) * rate * (1 - rate) / tokens) ** 0.5
    assert abs(control["acceptance"] - gated["acceptance"]) <= 4 * spread
    assert share * (1 - gated["acceptance"]) > 4 * spread  # so much more by the rate of all rows
    capsys.readouterr()
