"""A comparison: every arm its row, runs that fail leave the others alone, and a file that is gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.cli.app import main
from selectkd.config import recipe_from
from selectkd.errors import ConfigError
from selectkd.evals.studies.arms import PLAIN, POSITION, RANDOM, SELECTED, SHUFFLE, Arm, arms, controlled
from selectkd.evals.studies.compare import compare, differences, read_rows
from selectkd.evals.studies.one_run import empty, measured
from selectkd.objective.objective import Objective
from selectkd.training.run_folder import write_run
from selectkd.training.run_lock import locked
from training.tiny import recipe_of, tiny_llama, write_pair


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("compare")
    write_pair(root, tiny_llama(1, layers=3))
    content = {
        **recipe_of(root, data={"evaluation": 0.25}),
        "objective": {"divergence": "reverse_kl", "temperature": 2.0},
        "training": {
            "output_dir": str(root / "runs"),
            "max_steps": 3,
            "batch_size": 3,
            "learning_rate": 1e-2,
            "max_length": 24,
            "max_prompt_length": 12,
            "probe_samples": 0,
        },
    }
    path = root / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


ROW = {
    "method", "selection", "seed", "held_out_kl", "held_out_loss", "tar", "bite", "tokens_per_second", "peak_bytes",
}  # fmt: skip


PARENT = """
import multiprocessing, sys, threading, time
from selectkd.evals.studies.one_run import _end_with_parent

def work(told):
    import os
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told.send(os.getpid())
    time.sleep(600)

if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    here, there = context.Pipe(duplex=False)
    context.Process(target=work, args=(there,)).start()
    print(here.recv(), flush=True)
    time.sleep(600)
"""


def test_an_arms_process_ends_with_the_one_that_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT, "utf-8")
    room = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True, env=room
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(600):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the run goes on although nobody waits for it")


def test_a_folder_that_a_run_works_in_or_that_is_none_is_not_emptied(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_run(run, {"training.seed": 0})
    with locked(run), pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"):
        empty(run)
    assert (run / "run.json").is_file()
    empty(run)
    assert not run.exists()
    thesis = tmp_path / "mine" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        empty(thesis.parent)
    assert thesis.is_file()


def test_compare_writes_a_row_for_every_arm_and_goes_on_where_it_was(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.json"
    command = [
        "study",
        "compare",
        str(recipe),
        "--methods",
        "kd,adaspec",
        "--json",
        str(file),
        "--runs",
        str(tmp_path / "runs"),
    ]
    command += ["--set", f"reference={{model: {tmp_path / 'reference'}}}"]
    assert main(command) == 0
    told = capsys.readouterr().out
    rows = json.loads(file.read_text("utf-8"))
    assert [(row["method"], row["selection"], row["seed"]) for row in rows] == [
        ("kd", "none", 42), ("kd", "selected", 42), ("adaspec", "none", 42), ("adaspec", "selected", 42),
    ]  # fmt: skip
    assert all(set(row) >= ROW for row in rows)
    good, failed = rows[:2], rows[2:]
    for row in good:
        assert all(isinstance(row[name], int | float) for name in ROW - {"method", "selection"})
        assert 0 <= row["tar"] <= 1 and row["peak_bytes"] > 50e6 and len(row["held_out_kl_of"]) == 6
        assert sum(k * n for k, n in zip(row["held_out_kl_of"], row["held_out_tokens_of"], strict=True)) == (
            pytest.approx(row["held_out_kl"] * sum(row["held_out_tokens_of"]))
        )
    assert good[0]["tokens"] == good[1]["tokens"] and good[0]["held_out_kl"] != good[1]["held_out_kl"]
    for row in failed:  # the reference is not there, which only the run finds out
        assert "reference" in row["error"] and row["held_out_kl"] is None
    assert "kd none -> kd selected" in told and "failed: " in told

    write_pair_of_reference = tiny_llama(2)
    write_pair_of_reference.save_pretrained(tmp_path / "reference")
    from training.tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "reference")
    assert main(command) == 0
    again = json.loads(file.read_text("utf-8"))
    assert main([*command, "--dry-run"]) == 0
    assert "4 runs, 4 done, 0 to go" in capsys.readouterr().out
    assert main([*command, "--seeds", "2", "--dry-run"]) == 0
    assert "8 runs, 4 done, 4 to go, about " in capsys.readouterr().out
    assert again == json.loads(file.read_text("utf-8"))
    assert again[:2] == good  # not run again, to the last digit of the clock
    assert all("error" not in row and row["held_out_kl"] > 0 for row in again[2:])
    assert not list((tmp_path / "runs").glob("*/student"))


def test_every_arm_of_a_seed_starts_alike_and_differs_in_its_method_alone() -> None:
    base = {
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"sources": [{"path": "x"}], "evaluation": 0.1},
        "objective": {"divergence": "reverse_kl", "temperature": 2.0, "beta": 0.5},
        "training": {"output_dir": "o", "max_steps": 1, "batch_size": 1, "seed": 7, "learning_rate": 1e-3},
    }
    found = arms({"one": base}, ["kd", "gkd+on_policy"], seeds=2, controls=True)
    assert [arm.selection for arm in found[:4]] == [PLAIN, SELECTED, RANDOM, POSITION]
    assert [arm.seed for arm in found] == [7] * 8 + [8] * 8
    plain, selected, random, position = (recipe_from(arm.values) for arm in found[:4])
    assert plain.objective.divergence == {"name": "forward_kl"} and plain.objective.temperature == 2.0
    assert plain.objective.verifier == {"name": "always"}
    assert selected.objective.verifier == {"name": "greedy_topk", "k": 5} and selected.objective.beta == 0.01
    assert (
        plain.data == selected.data
        and plain.training == position.training
        and plain.student == position.student
    )
    random = recipe_from(controlled(found[2], {"acceptance": 0.3}).values)
    assert (
        random.objective.verifier == {"name": "matched_random", "rate": 0.3} and random.objective.beta == 0.01
    )
    assert (
        position.objective.verifier == {"name": "matched_position", "k": 5}
        and position.objective.beta == 0.01
    )
    assert recipe_from(found[4].values).data.policy.probability == 1.0  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("selection", "controls"),
    [
        ({"verifier": "spec_k", "k": 3, "beta": 0.2}, [RANDOM, POSITION]),
        ({"verifier": {"name": "teacher_entropy", "max": 0.5}, "beta": 0.0}, [RANDOM, POSITION]),
        ({"verifier": "sigmoid_entropy_gap", "beta": 0.0}, [RANDOM, POSITION]),
        ({"verifier": "prefix_gate", "k": 3}, [RANDOM]),
        ({"selector": "tip", "share": 0.2, "beta": 0.0}, [RANDOM]),
        ({"verifier": "iw_opd", "gamma": 0.3, "beta": 0.0}, [SHUFFLE]),
        ({"verifier": "fire", "beta": 0.0}, [SHUFFLE]),
    ],
)
def test_each_selection_has_the_controls_that_are_possible(
    selection: dict[str, Any], controls: list[str]
) -> None:
    base = {
        "teacher": {"model": "t"}, "student": {"model": "s"},
        "data": {"sources": [{"path": "x"}], "evaluation": 0.1},
        "training": {"output_dir": "o", "max_steps": 1, "batch_size": 1}, "selection": selection,
    }  # fmt: skip
    found = arms({"one": base}, ["kd"], seeds=1, controls=True)
    assert [arm.selection for arm in found] == [PLAIN, SELECTED, *controls]
    selected = recipe_from(found[1].values).objective
    for arm in found[2:]:
        one = controlled(arm, {"acceptance": 0.3}) if arm.selection == RANDOM else arm
        objective = recipe_from(one.values).objective
        assert objective.beta == selected.beta and objective.selector is None
        if arm.selection != RANDOM:
            assert objective.verifier == {"name": arm.selection, "of": selected.gate}
            Objective("forward_kl", objective.verifier)  # it can be made


def test_a_random_control_accepts_as_many_with_the_tokens_that_are_always_accepted() -> None:
    values = {"objective": {"always_accept": ["eos"]}, "selection": {"verifier": "greedy_topk", "k": 5}}
    arm = Arm("", "recipe", RANDOM, 1, values)
    made = controlled(arm, {"acceptance": 0.6, "always_accepted": 0.2}).values["selection"]
    assert made["rate"] == pytest.approx(0.5) and 0.2 + 0.8 * made["rate"] == pytest.approx(0.6)
    with pytest.raises(ConfigError, match="lacks always_accepted"):
        controlled(arm, {"acceptance": 0.6})
    with pytest.raises(ConfigError, match=r"mean weight is 1.25"):
        controlled(Arm("", "recipe", RANDOM, 1, {"selection": {}}), {"acceptance": 1.25})


@pytest.mark.parametrize("method", ["kd", "seqkd", "gkd", "distillm", "distillm2", "skd", "adaspec", "atkd"])
def test_a_gate_that_lets_everything_pass_is_no_gate_under_any_method(
    method: str, recipe: Path, tmp_path: Path
) -> None:
    """At beta = 1 the selected arm is the plain one to the last digit, in what it trains on and in what it learns: all
    that an arm's selection changes is the weights.
    """
    values = yaml.safe_load(recipe.read_text("utf-8"))
    values |= {"selection": {"verifier": "greedy_topk", "k": 50, "beta": 1.0}}
    values |= {"reference": {"model": values["teacher"]["model"]}}
    values["data"]["max_new_tokens"] = 4
    values["training"] |= {"max_steps": 2, "evaluate_every": 1}
    rows = [
        measured(dict(arm.values), tmp_path / arm.folder) for arm in arms({"one": values}, [method], seeds=1)
    ]
    if (
        method == "adaspec"
    ):  # its rows are cut out first where a verifier follows, and summed in another order
        assert rows[0]["held_out_kl_of"] == pytest.approx(rows[1]["held_out_kl_of"], rel=1e-6)
    else:
        assert rows[0]["held_out_kl_of"] == rows[1]["held_out_kl_of"]
    assert rows[0]["tokens"] == rows[1]["tokens"] and 0 < rows[1]["acceptance"] < 1
    log = [
        (tmp_path / f"{method}-{arm}-42" / "metrics.jsonl").read_text("utf-8") for arm in (PLAIN, SELECTED)
    ]
    losses = [[line["loss"] for line in map(json.loads, text.splitlines()) if "loss" in line] for text in log]
    # adaspec's rows are cut out first where a verifier follows, and their loss is summed in another order
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and len(losses[0]) == 2


def test_differences_are_paired_by_sequence_and_say_each_seeds_own() -> None:
    def row(method: str, selection: str, seed: int, kl: list[float]) -> dict[str, Any]:
        own = {"method": method, "selection": selection, "seed": seed}
        return own | {"held_out_kl_of": kl, "held_out_tokens_of": [10, 10, 10]}

    rows = [
        row("kd", PLAIN, 1, [1.0, 2.0, 3.0]), row("kd", PLAIN, 2, [1.0, 2.0, 3.0]),
        row("kd", SELECTED, 1, [1.5, 2.5, 3.5]), row("kd", SELECTED, 2, [1.1, 2.1, 3.1]),
        {**row("kd", SELECTED, 3, [9.0, 9.0, 9.0]), "error": "lost"},
    ]  # fmt: skip
    (pair,) = differences(rows)
    assert pair.first == ("kd", PLAIN) and pair.second == ("kd", SELECTED)
    assert pair.difference.value == pytest.approx(0.3)
    assert (pair.difference.low, pair.difference.high) == pytest.approx((0.3, 0.3))  # every sequence agrees
    assert pair.by_seed == pytest.approx((0.5, 0.1))
    over = pair.over_seeds  # t(.975, 1) = 12.7062 and a standard error of .2
    assert (over.low, over.value, over.high) == pytest.approx((0.3 - 2.54124, 0.3, 0.3 + 2.54124), abs=1e-4)


def test_a_difference_is_that_of_the_table_and_counts_every_token_alike() -> None:
    rows = [
        {"method": "kd", "selection": selection, "seed": 1, "held_out_kl_of": kl, "held_out_tokens_of": [90, 10],
         "held_out_kl": (90 * kl[0] + 10 * kl[1]) / 100}
        for selection, kl in ((PLAIN, [1.0, 1.0]), (SELECTED, [1.1, 0.5]))
    ]  # fmt: skip
    (pair,) = differences(rows)
    assert (
        pair.difference.value
        == pytest.approx(rows[1]["held_out_kl"] - rows[0]["held_out_kl"])
        == pytest.approx(0.04)
    )
    assert pair.by_seed == pytest.approx((0.04,))


def test_an_arm_that_diverges_leaves_the_others_their_rows(recipe: Path, tmp_path: Path) -> None:
    values = yaml.safe_load(recipe.read_text("utf-8"))
    made = arms({"one": values}, ["kd"], seeds=1)
    made[0].values["training"] |= {"learning_rate": 1e30, "max_steps": 8}  # type: ignore[index]
    rows = compare(made, tmp_path / "rows.json", tmp_path / "runs")
    assert rows[0]["error"] and rows[0]["held_out_kl"] is None and rows[1]["held_out_kl"] > 0
    assert read_rows(tmp_path / "rows.json") == json.loads(json.dumps(rows))


def test_a_plan_is_an_answer_too(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "compare", str(recipe), "--methods", "kd", "--dry-run", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["left"] == 2


def test_names_and_files_that_cannot_be_are_refused_before_any_run(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'kd'"):
        arms({"one": {}}, ["kdd"], seeds=1)
    with pytest.raises(ConfigError, match="Did you mean 'on_policy'"):
        arms({"one": {}}, ["gkd+onpolicy"], seeds=1)
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}', "utf-8")
    with pytest.raises(ConfigError, match="does not hold the rows"):
        read_rows(other)
    assert main(["study", "compare", str(recipe), "--methods", "adaspec"]) == 2  # it needs a reference
