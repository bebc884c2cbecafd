"""The suites of ``selectkd eval`` for models by name: each gives (rows, comparisons)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectkd.cli.terminal import show_progress
from selectkd.errors import ConfigError
from selectkd.objective.registry import did_you_mean

if TYPE_CHECKING:
    from selectkd.evals.memory import Memory
    from selectkd.evals.suites import Suite
    from selectkd.models.load import Loaded

MATH, QUICK_MATH, QUICK_CODE = 100, 20, 10
"""Problems where --limit names none: generated problems have no end of their own."""


@dataclass(frozen=True)
class EvalOptions:
    """The flags that decide what is measured."""

    suite: str
    data: Path | None
    limit: int | None
    tokens: int
    samples: int
    k: int
    temperature: float
    batch_size: int
    seed: int
    unsafe: bool
    max_length: int
    device: Any


def problems(
    names: list[str], options: EvalOptions, dtype: str, answers: Path | None, memory: Memory
) -> tuple[list[Any], list[Any]]:
    from selectkd.evals.run_suite import run_suite
    from selectkd.evals.runs import load_student

    suites = _suites(options)
    scored: dict[str, list[Any]] = {one.task: [] for one in suites}
    for name in names:
        loaded = load_student(name, dtype=dtype, device=options.device)
        for one in suites:
            scored[one.task].append(
                run_suite(
                    name, loaded, one, batch_size=options.batch_size, memory=memory, on_progress=show_progress
                )
            )
    return _kept_and_compared(scored, answers)


def harness(
    names: list[str], options: EvalOptions, dtype: str, answers: Path | None, tasks: tuple[str, ...],
    folder: Path | None, shots: int | None, chat: bool, memory: Memory,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    from selectkd.evals.harness import Harness
    from selectkd.evals.runs import load_student

    suite = Harness(tasks, folder, shots, chat, options.limit, options.batch_size)
    manager = suite.prepared()
    scored: dict[str, list[Any]] = {}
    for name in names:
        for one in suite.run(
            name,
            load_student(name, dtype=dtype, device=options.device),
            manager,
            memory=memory,
            on_progress=show_progress,
        ):
            scored.setdefault(f"{one.task} {one.metric}", []).append(one)
    return _kept_and_compared(scored, answers)


def _kept_and_compared(scored: dict[str, list[Any]], answers: Path | None) -> tuple[list[Any], list[Any]]:
    """The rows of every task's scores, and the models in pairs; each answer goes to a file where one is named."""
    from selectkd.data.durable import write_plain
    from selectkd.evals.run_suite import compared

    every = [one for of_task in scored.values() for one in of_task]
    if answers is not None:
        rows = "".join(json.dumps(row) + "\n" for one in every for row in one.answer_rows())
        write_plain(answers, rows.encode())
    pairs = [
        compared(first, second)
        for of_task in scored.values()
        for first, second in combinations(of_task, 2)
        if first.scores and second.scores
    ]
    return [one.as_row() for one in every], pairs


def _suites(options: EvalOptions) -> list[Suite]:
    """The problems of a suite; what is missing is an error before a model loads."""
    from selectkd.evals.sandbox import require
    from selectkd.evals.suites import arithmetic, programming, written_mathematics

    found = []
    if options.suite in ("math", "quick"):
        found.append(
            written_mathematics(options.data, options.limit, tokens=options.tokens)
            if options.data is not None and options.suite == "math"
            else arithmetic(
                options.limit or (QUICK_MATH if options.suite == "quick" else MATH),
                tokens=options.tokens,
                seed=options.seed,
            )
        )
    if options.suite in ("code", "quick"):
        level = require(unsafe=options.unsafe)
        show_progress(f"programs are locked in by {level}")
        found.append(
            programming(
                options.data if options.suite == "code" else None,
                options.limit or (QUICK_CODE if options.suite == "quick" else None),
                tokens=options.tokens, level=level, samples=options.samples, k=options.k,
                temperature=options.temperature, seed=options.seed,
            )
        )  # fmt: skip
    return found


def perplexity(names: list[str], options: EvalOptions, dtype: str) -> tuple[list[Any], list[Any]]:
    from selectkd.evals.perplexity import perplexity_compared, perplexity_row, surprises
    from selectkd.evals.runs import load_student

    assert options.data is not None  # checked above
    settings = {"max_length": options.max_length, "dtype": dtype}
    found, rows, tokenizers = [], [], []
    for name in names:
        loaded = load_student(name, dtype=dtype, device=options.device)
        seen = surprises(loaded, options.data, limit=options.limit, max_length=options.max_length)
        found.append((name, seen))
        tokenizers.append(loaded.tokenizer.get_vocab())
        rows.append(perplexity_row(name, options.data, seen, {**settings, "revision": loaded.revision}))
    pairs = [
        perplexity_compared(options.data.stem, found[i], found[j])
        for i, j in combinations(range(len(names)), 2)
        if tokenizers[i] == tokenizers[j]  # a token of another vocabulary is another unit
    ]
    return rows, pairs


def judge_loader(
    url: str | None, model: str | None, key_variable: str | None, dtype: str, device: Any, tokens: int
) -> Callable[[], Any]:
    """A function that loads the judge; ConfigError now for flags that cannot be."""
    from selectkd.evals.judging import EndpointJudge, ModelJudge
    from selectkd.evals.runs import load_student
    from selectkd.teachers.remote.connection import Connection
    from selectkd.teachers.remote.secrets import key_of
    from selectkd.teachers.remote.settings import JUDGE

    if url is None:
        return lambda: ModelJudge(load_student(str(model), dtype=dtype, device=device), tokens)
    if model is None:
        raise ConfigError(f"--judge {url} needs --judge-model, the name of the model there.")
    connection = Connection(url, key_of(key_variable, JUDGE.key), settings=JUDGE)
    return lambda: EndpointJudge(connection, model, tokens)


def instruct(
    names: list[str],
    options: EvalOptions,
    dtype: str,
    load_judge: Callable[[], Any],
    protocol: str,
    memory: Memory,
    budget: Any,
) -> tuple[list[Any], list[Any]]:
    from selectkd.evals.judging import PROTOCOLS, cost, unasked
    from selectkd.evals.judging.instruct import answered, judged, read_requests
    from selectkd.evals.runs import load_student
    from selectkd.evals.statistics import paired_bootstrap

    if protocol not in PROTOCOLS:
        raise ConfigError(f"--protocol {protocol} is not known.{did_you_mean(protocol, PROTOCOLS)}")
    assert options.data is not None  # checked above
    rules, requests = PROTOCOLS[protocol], read_requests(options.data, options.limit)
    pairs = {}
    for name in names:
        loaded: Loaded = load_student(name, dtype=dtype, device=options.device)
        on_progress = lambda done, name=name: show_progress(f"{name}: {done} of {len(requests)} answers")  # noqa: E731
        pairs[name] = answered(
            loaded,
            requests,
            rules,
            seed=options.seed,
            batch_size=options.batch_size,
            memory=memory,
            on_progress=on_progress,
        )
    price_in, price_out, most = budget
    judge, rows, contests = load_judge(), [], {}
    todo = unasked([pair for of_model in pairs.values() for pair in of_model], judge.name, memory)
    questions = [one.text for one in todo.values()]
    into, out, dollars = cost(questions, price_in=price_in, price_out=price_out, tokens=judge.tokens)
    show_progress(
        f"{len(questions)} verdicts to ask for: about {into:,} tokens to read and at most {out:,} to write, "
        f"${dollars:.2f}"
    )
    if most is not None and dollars > most:
        raise ConfigError(f"${dollars:.2f} is above --max-cost {most:g}. Judge fewer requests with --limit.")
    settings = {"data": str(options.data), "protocol": protocol, "dtype": dtype}
    for name, of_model in pairs.items():
        of_judge, contests[name] = judged(
            name, protocol, of_model, judge, rules, memory=memory, seed=options.seed, settings=settings
        )
        rows += of_judge
    comparisons = []
    for first, second in combinations(names, 2):
        both = [
            (one, two)
            for one, two in zip(contests[first].scores, contests[second].scores, strict=True)
            if one is not None and two is not None
        ]
        apart = paired_bootstrap([one for one, _ in both], [two for _, two in both])
        comparisons.append(
            {
                "task": protocol, "metric": "win_rate", "first": first, "second": second, "difference": apart.value,
                "low": apart.low, "high": apart.high, "p_bootstrap": apart.p, "n": apart.n,
            }
        )  # fmt: skip
    return rows, comparisons
