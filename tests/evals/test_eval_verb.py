"""``selectkd eval``: rows with their intervals and settings, models compared on the same problems, refusals first."""

from __future__ import annotations

import importlib.util
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from selectkd.cli import main
from selectkd.data.durable import whole_lines
from selectkd.errors import DataError
from selectkd.evals.code import exercise, pass_at_k, program
from selectkd.evals.judging import Protocol
from selectkd.evals.judging.instruct import answered, judged, read_requests
from selectkd.evals.memory import Memory
from selectkd.evals.run_suite import Scores, compared, interval_of
from selectkd.evals.sandbox import level
from selectkd.evals.suites import arithmetic
from selectkd.models.load import load_model
from teachers.served import on_a_port


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test keeps its answers in a folder of its own."""
    monkeypatch.chdir(tmp_path)


CONTRACT = {"task", "metric", "value", "low", "high", "n", "settings"}


def test_perplexity_is_that_of_the_plain_program_and_models_are_compared_in_pairs(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, text, teacher = tmp_path / "e.json", tiny_run.parent / "text.jsonl", tiny_run.parent / "teacher"
    code = main(
        ["eval", str(tiny_run), "--suite", "perplexity", "--data", str(text), "--compare", str(teacher), "--limit", "5",
         "--json", str(answer)]
    )  # fmt: skip
    assert code == 0, capsys.readouterr().err
    seen = json.loads(answer.read_text())
    assert all(row.keys() >= CONTRACT and row["low"] <= row["value"] <= row["high"] for row in seen["rows"])
    loaded = load_model(teacher)
    total = count = 0.0
    for line in text.read_text().splitlines()[:5]:
        record = json.loads(line)
        prompt = loaded.tokenizer(record["prompt"])["input_ids"]
        whole = [
            *loaded.tokenizer(record["prompt"] + record["completion"])["input_ids"],
            loaded.tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            logq = torch.log_softmax(loaded.model(torch.tensor([whole])).logits[0], -1)
        total -= sum(float(logq[i - 1, whole[i]]) for i in range(len(prompt), len(whole)))
        count += len(whole) - len(prompt)
    assert seen["rows"][1]["settings"]["tokens"] == count
    assert seen["rows"][1]["value"] == pytest.approx(math.exp(total / count), rel=1e-4)
    (pair,) = seen["comparisons"]
    assert (
        pair["first"] == str(tiny_run)
        and pair["second"] == str(teacher)
        and pair["low"] <= pair["difference"]
    )


def test_math_of_a_file_is_graded_and_every_answer_kept(tiny_run: Path, tmp_path: Path) -> None:
    problems = tmp_path / "problems.jsonl"
    problems.write_text(
        "".join(json.dumps({"question": f"w{i} w2", "answer": f"#### {i}"}) + "\n" for i in range(6))
    )
    answer, kept = tmp_path / "e.json", tmp_path / "answers.jsonl"
    teacher = str(tiny_run.parent / "teacher")
    code = main(
        ["eval", str(tiny_run), "--suite", "math", "--data", str(problems), "--tokens", "4", "--compare", teacher,
         "--json", str(answer), "--answers", str(kept)]
    )  # fmt: skip
    assert code == 0
    seen = json.loads(answer.read_text())
    row = seen["rows"][0]
    assert row["n"] == 6 and row["metric"] == "accuracy" and row["settings"]["temperature"] == 0.0
    assert {"max_new_tokens", "stop", "revision", "template", "shots", "seed", "dtype"} <= row[
        "settings"
    ].keys()
    assert len(kept.read_text().splitlines()) == 12
    assert {"p_mcnemar", "p_bootstrap", "only_first", "only_second"} <= seen["comparisons"][0].keys()


def test_what_cannot_be_measured_is_refused_before_a_model_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (
        ["--suite", "perplexity"], ["--suite", "instruct"], ["--suite", "instruct", "--data", "x.jsonl"],
        ["--suite", "code", "--k", "3", "--samples", "2"], ["--suite", "quick", "--json", str(tmp_path / "no" / "x")],
        ["--suite", "quick", "--answers", str(tmp_path / "no" / "x")],
    ):  # fmt: skip
        assert main(["eval", "no-such/model", *flags]) == 2
        assert "no-such/model" not in capsys.readouterr().err


HUMANEVAL = {
    "task_id": "T/0", "prompt": "import math\n\ndef double(x):\n    \"\"\"Twice x.\"\"\"\n", "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(2) == 4",
}  # fmt: skip


BEGUN = "import math\ndef double(x):\n    return"


@pytest.mark.parametrize(
    ("answer", "ends"),
    [
        ("    return 2 * x\n", '"""Twice x."""\n    return 2 * x\n'),
        ("Sure!\n```python\ndef double(x):\n    return 2 * x\n```\nDone.", f"{BEGUN} 2 * x\n"),
        ("```\nx = 1\n```\n```python\ndef double(x):\n    return 2\n```", f"{BEGUN} 2\n"),
        ("def double(x):\n    return 3", f"{BEGUN} 3"),
        ("```python\ndef double(x):\n    return 2", f"{BEGUN} 2"),
    ],
)
def test_the_program_is_found_in_an_answer(answer: str, ends: str) -> None:
    found = program(answer, exercise(HUMANEVAL, "x:1"))
    assert found.replace("\n\n", "\n").endswith(ends) and found.startswith("import math")
    compile(found, "answer", "exec")


def test_mbpp_records_name_their_function_and_others_are_refused() -> None:
    one = exercise({"task_id": 1, "text": "Add.", "test_list": ["assert add(1, len('a')) == 2"]}, "x:1")
    assert one.names == ("add",) and one.begun == "" and "assert add" in one.prompt
    assert program("```python\ndef add(a, b): return a + b\n```", one) == "def add(a, b): return a + b\n"
    with pytest.raises(DataError, match="x:2"):
        exercise({"question": "?"}, "x:2")


def test_pass_at_k_is_the_mean_over_all_choices_of_k() -> None:
    from itertools import combinations

    for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 0, 2), (6, 6, 2), (7, 3, 7)):
        right = [True] * c + [False] * (n - c)
        tries = [any(right[i] for i in chosen) for chosen in combinations(range(n), k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(tries) / len(tries))


def test_pairs_of_scores_are_compared_on_the_same_problems() -> None:
    def made(name: str, scores: list[float]) -> Scores:
        return Scores(name, "t", "accuracy", scores, interval_of(scores), {}, [])

    row = compared(made("a", [0.0] * 8 + [1.0, 1.0]), made("b", [1.0] * 8 + [1.0, 0.0]))
    assert (row["only_first"], row["only_second"], row["n"]) == (1, 8, 10)
    assert (
        row["difference"] == pytest.approx(0.7)
        and row["low"] > 0
        and row["p_mcnemar"] == pytest.approx(20 / 512)
    )
    assert "p_mcnemar" not in compared(made("a", [0.5, 1.0]), made("b", [1.0, 1.0]))


def test_code_of_a_file_is_run_and_the_level_is_told(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not level().safe:
        pytest.skip("this machine does not lock programs in")
    for name, record in (
        ("humaneval", HUMANEVAL),
        ("mbpp", {"task_id": 1, "text": "Add.", "code": "", "test_list": ["assert add(1, 1) == 2"]}),
    ):
        problems, answer = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
        problems.write_text(json.dumps(record) + "\n")
        flags = ["--suite", "code", "--data", str(problems), "--tokens", "3", "--samples", "2", "--k", "2"]
        assert main(["eval", str(tiny_run), *flags, "--json", str(answer)]) == 0
        (row,) = json.loads(answer.read_text())["rows"]
        assert row["metric"] == "pass@2" and row["value"] == 0.0 and "seccomp" in row["settings"]["sandbox"]
        assert "isolated by rlimits" in capsys.readouterr().err


def test_made_problems_are_the_same_for_the_same_seed_and_graded_by_their_maker() -> None:
    if importlib.util.find_spec("reasoning_gym") is None:
        pytest.skip("reasoning-gym is not installed")
    one, two = (arithmetic(4, tokens=8, seed=3) for _ in range(2))
    assert one.prompts == two.prompts != arithmetic(4, tokens=8, seed=4).prompts
    import reasoning_gym

    made = reasoning_gym.create_dataset("gsm_symbolic", seed=3, size=4)
    for i in range(4):
        assert one.score(i, [f"Step by step. #### {made[i]['answer']}"]) == 1.0
        assert one.score(i, [f"#### {int(made[i]['answer']) + 1}"]) == 0.0 == one.score(i, ["no idea"])


def test_instruct_is_judged_in_both_orders_by_whoever_judges(tiny_run: Path, tmp_path: Path) -> None:
    requests, memory = tmp_path / "r.jsonl", tmp_path / "v.jsonl"
    requests.write_text(
        "".join(json.dumps({"instruction": f"w{i} w3", "output": "w1 w2"}) + "\n" for i in range(2))
    )
    rules = Protocol("a reference", max_new_tokens=3)
    loaded = load_model(tiny_run / "student")
    pairs = answered(loaded, read_requests(requests, None), rules, seed=0, batch_size=2)
    assert [one.reference for one in pairs] == ["w1 w2"] * 2

    class Always:
        name = "always the first"

        def ask(self, questions: Sequence[str], heard: Callable[[int, str], None]) -> None:
            for index, text in enumerate(questions):
                mark = text.split("with the mark ")[1][:20]
                heard(index, f"{mark} verdict: 1")

    rows, seen = judged(
        "m", "alpaca_eval", pairs, Always(), rules, memory=Memory.opened(memory), seed=0, settings={}
    )
    assert seen.ties == 2 and [row["metric"] for row in rows] == ["win_rate", "length_controlled_win_rate"]
    assert rows[0]["value"] == 0.5 and rows[0]["settings"]["judge"] == "always the first"


def test_a_resumed_judgement_costs_only_what_was_not_asked(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Judging:
        """An OpenAI-compatible judge that prefers the first answer, and refuses after ``left`` verdicts."""

        def __init__(self, left: int) -> None:
            self.left, self.asked, self.one_by_one = left, 0, threading.Lock()

        def answer(
            self, path: str, headers: dict[str, str], content: bytes
        ) -> tuple[int, dict[str, str], bytes]:
            with self.one_by_one:
                if path != "/v1/chat/completions" or self.asked == self.left:
                    return 400, {}, b"no more"
                self.asked += 1
            time.sleep(0.05 * self.asked)  # the refusals come first: a verdict given is read all the same
            mark = json.loads(content)["messages"][0]["content"].split("with the mark ")[1][:20]
            said = {"choices": [{"message": {"content": f"{mark} verdict: 1"}}]}
            return 200, {}, json.dumps(said).encode()

    requests, answer = tmp_path / "r.jsonl", tmp_path / "e.json"
    requests.write_text(
        "".join(json.dumps({"instruction": f"w{i} w3", "output": "w1 w2"}) + "\n" for i in range(3))
    )
    judge = Judging(left=4)
    with on_a_port(judge) as url:  # pyright: ignore[reportArgumentType]
        command = ["eval", str(tiny_run), "--suite", "instruct", "--data", str(requests), "--judge", f"{url}/v1",
                   "--judge-model", "j", "--price-out", "1000", "--json", str(answer)]  # fmt: skip
        assert main([*command, "--max-cost", "2"]) == 2 and judge.asked == 0
        assert "6 verdicts to ask for" in capsys.readouterr().err
        assert main(command) == 4
        kept = sum("judge" in json.loads(line) for line in whole_lines(tmp_path / "eval-memory.jsonl"))
        assert kept == judge.asked == 4
        judge.asked, judge.left = 0, 99
        capsys.readouterr()
        assert main(command) == 0 and judge.asked == 2
        assert "2 verdicts to ask for" in capsys.readouterr().err
        whole = answer.read_text()
        assert main([*command, "--max-cost", "0"]) == 0 and judge.asked == 2 and answer.read_text() == whole
    rows = json.loads(whole)["rows"]
    assert rows[0]["settings"]["ties"] == 3 and rows[0]["value"] == 0.5, (
        "a judge of one order decides nothing"
    )


def test_a_file_without_a_problem_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    for suite in ("math", "code", "instruct", "perplexity"):
        flags = ["--suite", suite, "--data", str(empty), "--judge-model", "no-such/model"]
        assert main(["eval", str(tiny_run), *flags]) == 3, suite
        assert "empty.jsonl" in capsys.readouterr().err
