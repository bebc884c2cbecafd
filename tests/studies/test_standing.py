"""Which rows stand, what a study may ask for, and how the numbers of a run's row are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from selectkd.cli.app import main
from selectkd.errors import ConfigError
from selectkd.evals.studies import measures
from selectkd.evals.studies.arms import arms
from selectkd.evals.studies.compare import compare, plan
from selectkd.evals.studies.files import files_read
from selectkd.evals.studies.one_run import curve_of, measured
from selectkd.evals.studies.results import last_fall
from selectkd.evals.studies.rows import append_row, read_rows
from selectkd.evals.studies.study import Job, arms_of, mark_of, of_recipes, values_of
from studies.test_study import load_study, study_of, written
from training.tiny import tiny_llama, write_pair


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("standing")
    write_pair(root, tiny_llama(1, layers=3))
    return root


def row_of(study: Any, name: str, seed: int, rate: float | None, **numbers: Any) -> dict[str, Any]:
    arm = {arm.name: arm for arm in arms_of(study)}[name]
    mark = mark_of(study, values_of(study, Job(arm, seed, rate), numbers.pop("of_rate", None)))
    return {"arm": name, "seed": seed, "learning_rate": rate, "recipe": mark, "held_out_kl": 1.0, **numbers}


def test_results_leave_out_rows_of_recipes_that_the_study_no_longer_has(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, there = tmp_path / "s.yaml", tmp_path / "s.jsonl"
    content = study_of(root, controls=["matched_random"], seeds=[1, 2])
    study = load_study(written(file, content))
    for seed in (1, 2):
        append_row(there, row_of(study, "kd", seed, None, wall_seconds=1.0))
        append_row(there, row_of(study, "gated", seed, None, acceptance=0.5, wall_seconds=1.0))
        append_row(there, row_of(study, "gated/matched_random", seed, None, of_rate=0.5, wall_seconds=1.0))
    append_row(there, {"arm": "gone", "seed": 1, "learning_rate": None, "recipe": "x", "wall_seconds": 60.0})
    append_row(there, {"arm": "kd", "seed": 9, "learning_rate": None, "recipe": "x", "wall_seconds": 60.0})
    rows = read_rows(there)
    assert of_recipes(study, rows) == {
        key: row for key, row in rows.items() if key[0] != "gone" and key[1] < 9
    }
    assert main(["study", "results", str(file)]) == 0
    told = capsys.readouterr()
    assert "2 of 8 rows are left out" in told.err and "6 runs in 0 minutes" in told.out

    # another rate of the gated run is another control; another recipe of the arm another run of it
    other = row_of(study, "gated", 1, None, acceptance=0.6)
    assert ("gated/matched_random", 1, None) not in of_recipes(study, {**rows, ("gated", 1, None): other})
    content["arms"]["kd"] = {"method": "kd", "objective": {"temperature": 2.0}}
    assert {key[0] for key in of_recipes(load_study(written(file, content)), rows)} == {
        "gated", "gated/matched_random"
    }  # fmt: skip


def test_a_comparisons_row_of_models_or_text_that_were_made_again_is_run_again(tmp_path: Path) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    values = study_of(tmp_path)["recipe"]
    values["training"] |= {"output_dir": str(tmp_path / "runs"), "max_steps": 1}
    found, file = arms({"one": values}, ["kd"], seeds=1)[:1], tmp_path / "rows.json"
    (row,) = compare(found, file, tmp_path / "runs")
    assert row["files"] == files_read(found[0].values) and plan(found, file).done == 1
    tiny_llama(9, layers=3).save_pretrained(tmp_path / "teacher")
    assert plan(found, file).done == 0
    old = [{key: value for key, value in row.items() if key != "files"}]
    file.write_text(json.dumps(old))
    assert plan(found, file).done == 1  # a row that does not say what it read


def test_text_in_a_folder_and_a_cache_without_its_teachers_name_are_among_the_files_of_a_row(
    root: Path, tmp_path: Path
) -> None:
    (tmp_path / "text" / "train").mkdir(parents=True)
    part, index = tmp_path / "text" / "train" / "a.jsonl", tmp_path / "cache" / "index.json"
    index.parent.mkdir()
    values = study_of(root)["recipe"]
    values["data"]["sources"] = [{"path": str(tmp_path / "text")}]
    values["training"]["output_dir"] = "unused"
    values["teacher"] = {"cache": str(index.parent)}
    seen = set()
    for text, cache in (("a", "x"), ("b", "x"), ("b", "y")):
        part.write_text(text)
        index.write_text(cache)
        seen.add(files_read(values))
    assert len(seen) == 3 and None not in seen


def test_a_study_that_asks_for_what_no_row_can_say_is_refused(root: Path, tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        file = written(tmp_path / "wrong.yaml", study_of(root, **changes))
        with pytest.raises(ConfigError, match=match):
            load_study(file)

    claim = {"first": "kd", "second": "gated", "expected": "lower"}
    trend = {"of": {"kd": 1, "gated": 2}}
    refused("outcome names exact_match, which no row has without completions", outcome="exact_match")
    refused("tuned_by names kappa, .* without dynamics", tuned_by="kappa", learning_rates=[1e-3])
    refused("claims names draft_speedup, .* without draft", claims=[{**claim, "measure": "draft_speedup"}])
    refused("trends names flips, .* without dynamics", trends=[{**trend, "measure": "flips"}])
    refused("one quantity for all arms", trends=[{"of": {"kd": 2, "gated": 2}}])
    refused("names a rate twice", learning_rates=[1e-3, 0.001])
    refused("tuned_by does nothing without learning_rates", tuned_by="overlap")
    refused("tuning_seed does nothing without learning_rates", tuning_seed=3)
    refused("arms.one sets training.seed", arms={"one": {"training": {"seed": 5}}})


def test_acceptance_is_the_mean_over_tokens_however_often_a_run_is_logged(root: Path, tmp_path: Path) -> None:
    """5 steps, logged at each, or at the 4th and the last, of which the first stands for four steps."""
    study = load_study(written(tmp_path / "s.yaml", study_of(root)))
    rows = []
    for every in (1, 4):
        values = values_of(study, Job(arms_of(study)[1], 1, 1e-2), None)
        values["training"] |= {"max_steps": 5, "log_every": every}
        rows.append(measured(values, tmp_path / "run"))
    assert 0 < rows[0]["acceptance"] < 1
    for name in ("acceptance", "mean_weight"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-12)


def test_measures_see_the_student_without_dropout(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load_study(written(tmp_path / "s.yaml", study_of(root)))
    mode = {"mode": lambda assembly, recipe: {"training": float(assembly.student.training)}}
    monkeypatch.setattr(measures, "MEASURES", mode)
    values = values_of(study, Job(arms_of(study)[0], 1, 1e-2), None)
    assert measured(values, tmp_path / "run", measures=["mode"])["training"] == 0.0


def test_looks_that_were_not_finite_leave_a_gap_in_the_curve_and_break_nothing() -> None:
    """metrics.jsonl has null for them."""
    numbers = [
        {"kl": 2.0, "tar": 0.123456, "perplexity": None},
        {"kl": 1.0, "tar": 0.1},
        {"kl": None, "tar": None},
    ]
    curve, before = curve_of(list(zip((0, 5, 10), numbers, strict=True)))
    assert curve == [[0, 2.0, 0.12346], [5, 1.0, 0.1], [10, None, None]] and before is None
    assert last_fall({"curve": curve}) is None
    assert curve_of([(0, {"kl": 1.0, "tar": 1.0, "perplexity": 1.0})])[1] == 0.0
    assert curve_of([(3, {"kl": 1.0, "tar": 1.0, "perplexity": 1.0})])[1] is None and curve_of([]) == (
        [],
        None,
    )
