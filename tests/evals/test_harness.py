"""``selectkd eval --suite harness`` says what lm-evaluation-harness's own command line says, to the last digit."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from faults.chaos import in_fork
from selectkd.cli import main
from selectkd.cli.demo_pair import byte_tokenizer
from selectkd.data.durable import FAULT, whole_lines
from selectkd.evals import harness
from selectkd.models.load import PACKAGED, load_model
from speculative.test_decode import tiny

HAS_HARNESS = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not HAS_HARNESS, reason="lm-eval is not installed (extra `harness`)")
CHOICES = (
    ("The sun is", ["hot", "a fish"]), ("Ice is", ["cold", "made of bread", "loud"]), ("Cats drink", ["milk", "stone"]),
    ("Two and two make", ["four", "nine"]), ("Paris is a city in", ["France", "Spain", "Japan"]),
    ("Birds can", ["fly", "read newspapers"]), ("At night it is", ["dark", "yellow"]), ("Bread is", ["eaten", "sung"]),
)  # fmt: skip
SUMS = ((2, 3), (4, 4), (1, 6), (5, 2), (9, 1), (3, 3))
TEXTS = (
    "The cat sat on the mat and slept.",
    "Water boils when it is hot enough.",
    "He read the letter twice.",
)


def write_tasks(folder: Path) -> None:
    """Three local tasks: a choice with two shots, an answer that is written and filtered, a text's perplexity."""

    def task(name: str, records: list[dict[str, Any]], **settings: Any) -> None:
        data = folder / f"{name}.json"
        data.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        told = {
            "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test", **settings,
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(told), encoding="utf-8")

    def metric(name: str) -> dict[str, Any]:
        return {"metric": name, "aggregation": "mean", "higher_is_better": True}

    task(
        "local_choice", [{"q": q, "options": options, "gold": 0} for q, options in CHOICES],
        output_type="multiple_choice", doc_to_text="{{q}}", doc_to_choice="{{options}}", doc_to_target="{{gold}}",
        fewshot_split="test", num_fewshot=2, metric_list=[metric("acc"), metric("acc_norm")],
    )  # fmt: skip
    task(
        "local_sum", [{"q": f"{a} + {b}", "a": str(a + b)} for a, b in SUMS],
        output_type="generate_until", doc_to_text="Question: {{q}} = ?\nAnswer:", doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 12, "do_sample": False},
        filter_list=[
            {"name": "number", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]}
        ],
        metric_list=[metric("exact_match")],
    )  # fmt: skip
    task(
        "local_text", [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling", doc_to_text="",
        doc_to_target="{{text}}", metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip


@pytest.mark.long
@needs_harness
@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGED) is None, reason="the demo teacher's weights are not installed"
)
def test_our_numbers_are_those_of_the_harness_own_command_line(tmp_path: Path) -> None:
    """SmolLM2-135M, three tasks, one computer, the same settings: every value and every problem's score is equal."""
    teacher = load_model(PACKAGED)
    teacher.model.save_pretrained(tmp_path / "model")  # pyright: ignore[reportCallIssue]
    teacher.tokenizer.save_pretrained(tmp_path / "model")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    write_tasks(tasks)
    named, environment = "local_choice,local_sum,local_text", {**os.environ, "HF_HUB_OFFLINE": "1"}

    def run(*words: str) -> None:
        done = subprocess.run([sys.executable, "-m", *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]

    run(
        "lm_eval", "run", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'},dtype=float32",
        "--tasks", named, "--include_path", str(tasks), "--batch_size", "2", "--device", "cpu",
        "--output_path", str(tmp_path / "theirs"),
    )  # fmt: skip
    run(
        "selectkd", "eval", str(tmp_path / "model"), "--suite", "harness", "--tasks", named,
        "--task-folder", str(tasks),
        "--batch-size", "2", "--json", str(tmp_path / "ours.json"), "--answers", str(tmp_path / "answers.jsonl"),
    )  # fmt: skip
    (file,) = (tmp_path / "theirs").rglob("results*.json")
    theirs = json.loads(file.read_text())
    ours = json.loads((tmp_path / "ours.json").read_text())["rows"]
    told = {
        (task, key): value
        for task, row in theirs["results"].items()
        for key, value in row.items()
        if "," in key and "_stderr" not in key
    }
    mine = {
        (row["task"], row["metric"] if "," in row["metric"] else f"{row['metric']},none"): row["value"]
        for row in ours
    }
    assert mine == told and len(mine) == 4
    assert all(row["low"] <= row["value"] <= row["high"] for row in ours)
    choice = next(row for row in ours if row["metric"] == "acc")
    assert choice["n"] == len(CHOICES) and choice["settings"]["shots"] == 2
    scores = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert sum(row["score"] for row in scores if row["metric"] == "acc") / len(CHOICES) == choice["value"]


@pytest.mark.long
@needs_harness
def test_a_killed_harness_goes_on_and_asks_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(harness, "BETWEEN", 0.0)  # each answer a line: a kill finds the run in its middle
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path)
    tiny(0, width=257).float().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")

    def command(name: str, *more: str) -> list[str]:
        tasks = ["--tasks", "local_choice,local_sum,local_text", "--task-folder", str(tmp_path)]
        kept = ["--json", f"{name}.json", "--memory", f"{name}.memory"]
        return ["eval", str(tmp_path / "model"), "--suite", "harness", *tasks, *kept, *more]

    def questions(name: str) -> list[str]:
        return [key for line in whole_lines(Path(f"{name}.memory")) for key in json.loads(line)["kept"]]

    assert main(command("whole")) == 0
    asked = questions("whole")
    options = sum(len(options) for _, options in CHOICES)
    assert len(asked) == len(set(asked)) == options + len(SUMS) + len(TEXTS)

    def killed(at: int) -> None:
        monkeypatch.setenv(FAULT, f"lines@{at}=kill")
        torch.set_num_threads(1)
        main(command("cut"))

    for at in (3, options):  # among the choices, and after them
        assert in_fork(lambda at=at: killed(at)) == -signal.SIGKILL
    assert len(questions("cut")) == options + 3
    assert main(command("cut")) == 0 and sorted(questions("cut")) == sorted(asked)
    values, again = (
        [row["value"] for row in json.loads(Path(f"{n}.json").read_text())["rows"]] for n in ("whole", "cut")
    )
    assert again == pytest.approx(values, rel=1e-6)
    before = Path("cut.memory").read_bytes()
    assert main(command("cut")) == 0 and Path("cut.memory").read_bytes() == before
    assert main(command("cut", "--batch-size", "3", "--tasks", "local_sum")) == 0
    assert len(questions("cut")) == len(asked) + len(SUMS), "another setting reuses nothing"
    capsys.readouterr()


@pytest.mark.slow
@needs_harness
def test_a_group_has_its_own_number_with_the_problems_behind_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    write_tasks(tmp_path)
    other = yaml.safe_load((tmp_path / "local_choice.yaml").read_text()) | {
        "task": "local_other",
        "num_fewshot": 0,
    }
    (tmp_path / "local_other.yaml").write_text(yaml.safe_dump(other))
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "local_all", "task": ["local_choice", "local_other"], "aggregate_metric_list": [mean]}
    (tmp_path / "local_all.yaml").write_text(yaml.safe_dump(group))
    tiny(0, width=257).float().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    flags = [
        "--suite",
        "harness",
        "--tasks",
        "local_all",
        "--task-folder",
        str(tmp_path),
        "--json",
        "found.json",
    ]
    assert main(["eval", str(tmp_path / "model"), *flags]) == 0
    rows = {(row["task"], row["metric"]): row for row in json.loads(Path("found.json").read_text())["rows"]}
    parts = [rows[task, "acc"] for task in ("local_choice", "local_other")]
    whole = rows["local_all", "acc"]
    assert whole["value"] == pytest.approx(sum(one["value"] for one in parts) / 2)
    assert whole["n"] == 2 * len(CHOICES) and whole["low"] < whole["value"] < whole["high"]
    assert whole["settings"]["tasks"] == ["local_choice", "local_other"]


@needs_harness
def test_a_task_that_is_not_there_is_refused_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    (tmp_path / "local_sum.json").unlink()
    for name, code, says in (("local_chioce", 2, "local_choice"), ("local_sum", 3, "cannot be loaded")):
        flags = ["--suite", "harness", "--tasks", name, "--task-folder", str(tmp_path)]
        assert main(["eval", "no-such/model", *flags]) == code
        told = capsys.readouterr().err
        assert says in told and "no-such/model" not in told


@needs_harness
def test_tasks_of_a_folder_do_not_wait_for_the_list_of_the_harness_unless_they_name_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_tasks(tmp_path)
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "local_all", "task": ["local_choice", "hellaswag"], "aggregate_metric_list": [mean]}
    (tmp_path / "local_all.yaml").write_text(yaml.safe_dump(group))
    prepared = harness.Harness(("local_choice",), tmp_path).prepared()
    assert {"local_choice", "local_sum"} <= {*prepared.all_tasks} and "hellaswag" not in prepared.all_tasks
    assert harness.Harness(("local_all",), tmp_path)._of_folder_alone() is None


def test_the_harness_suite_says_what_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "no-such/model", "--suite", "harness"]) == 2
    assert "--tasks" in capsys.readouterr().err
    if not HAS_HARNESS:
        assert main(["eval", "no-such/model", "--suite", "harness", "--tasks", "hellaswag"]) == 2
        assert "selectkd[harness]" in capsys.readouterr().err
