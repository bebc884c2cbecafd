"""The suites of ``selectkd eval`` for models by name: each gives (rows, comparisons)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectkd.cli.terminal import show_progress
from selectkd.errors import ConfigError
from selectkd.objective.registry import did_you_mean

if TYPE_CHECKING:
    from selectkd.evals.suites import Suite
    from selectkd.models.load import Loaded

MATH, QUICK_MATH, QUICK_CODE = 100, 20, 10
"""Problems where --limit names none: generated problems have no end of their own."""

Results = tuple[list[Any], list[Any]]
"""The rows of the models, and the models in pairs."""


@dataclass(frozen=True)
class JudgeOptions:
    """The flags of --suite instruct: who judges, under which protocol, and for how many dollars."""

    url: str | None
    model: str | None
    key_variable: str | None
    tokens: int
    protocol: str
    price_in: float
    price_out: float
    max_cost: float | None


@dataclass(frozen=True)
class HarnessOptions:
    """The flags of --suite harness."""

    tasks: str | None
    folder: Path | None
    shots: int | None
    chat: bool


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
    unsafe: bool
    max_length: int
    dtype: str
    seed: int
    answers: Path | None
    memory: Path
    judge: JudgeOptions
    harness: HarnessOptions
    size: int


@dataclass(frozen=True)
class Here:
    """Where the models run, and how many answers they write at once."""

    device: Any
    batch_size: int

    def student(self, name: str, dtype: str) -> Loaded:
        """A run's student, or a model by name."""
        from selectkd.evals.runs import load_student

        return load_student(name, dtype=dtype, device=self.device)


def check(options: EvalOptions) -> None:
    """ConfigError, before anything loads, for flags that do not go together."""
    suite, judge = options.suite, options.judge
    if options.k > options.samples:
        raise ConfigError(f"--k {options.k} needs --samples {options.k} or more; it is {options.samples}.")
    if suite in ("perplexity", "instruct") and options.data is None:
        raise ConfigError(f"--suite {suite} needs --data FILE.")
    if suite == "instruct" and judge.url is None and judge.model is None:
        raise ConfigError(
            "--suite instruct needs --judge URL with --judge-model NAME, or a local --judge-model."
        )
    if suite == "harness" and not options.harness.tasks:
        raise ConfigError("--suite harness needs --tasks, for example --tasks hellaswag,arc_easy.")
    if suite == "vision":
        from selectkd.evals.vision.benchmarks import chosen_benchmarks

        named = chosen_benchmarks(options.harness.tasks or "synthetic")
        if "mmvet" in named and judge.url is None and judge.model is None:
            raise ConfigError(
                "--tasks mmvet is graded by a judge: add --judge URL with --judge-model NAME, or a local --judge-model."
            )
    if options.memory.is_dir():
        raise ConfigError(
            f"--memory {options.memory} is a folder. Name a file, for example {options.memory / 'eval-memory.jsonl'}."
        )


def own(names: list[str], options: EvalOptions, here: Here) -> Results:
    """The text that the first model's run held out."""
    from selectkd.evals.own_text import own_text

    loaders = [(name, partial(here.student, name, options.dtype)) for name in names]
    return own_text(
        names[0], loaders, limit=options.limit, batch_size=here.batch_size, on_progress=show_progress
    )


def problems(names: list[str], options: EvalOptions, here: Here) -> Results:
    """Problems whose answers a program can check: mathematics and programs."""
    from selectkd.evals.memory import Memory
    from selectkd.evals.run_suite import run_suite

    suites, memory = _suites(options), Memory.opened(options.memory)
    scored: dict[str, list[Any]] = {one.task: [] for one in suites}
    for name in names:
        loaded = here.student(name, options.dtype)
        for one in suites:
            scored[one.task].append(
                run_suite(
                    name, loaded, one, batch_size=here.batch_size, memory=memory, on_progress=show_progress
                )
            )
    return _kept_and_compared(scored, options.answers)


def harness(names: list[str], options: EvalOptions, here: Here) -> Results:
    """Tasks of lm-evaluation-harness."""
    from selectkd.evals.harness import Harness
    from selectkd.evals.memory import Memory

    flags = options.harness
    tasks = tuple(one.strip() for one in str(flags.tasks).split(","))
    suite = Harness(tasks, flags.folder, flags.shots, flags.chat, options.limit, here.batch_size)
    memory, manager = Memory.opened(options.memory), suite.prepared()
    scored: dict[str, list[Any]] = {}
    for name in names:
        loaded = here.student(name, options.dtype)
        for one in suite.run(name, loaded, manager, memory=memory, on_progress=show_progress):
            scored.setdefault(f"{one.task} {one.metric}", []).append(one)
    return _kept_and_compared(scored, options.answers)


def _kept_and_compared(scored: dict[str, list[Any]], answers: Path | None) -> Results:
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
        show_progress(f"programs are isolated by {level}")
        found.append(
            programming(
                options.data if options.suite == "code" else None,
                options.limit or (QUICK_CODE if options.suite == "quick" else None),
                tokens=options.tokens, level=level, samples=options.samples, k=options.k,
                temperature=options.temperature, seed=options.seed,
            )
        )  # fmt: skip
    return found


def perplexity(names: list[str], options: EvalOptions, here: Here) -> Results:
    """The perplexity of a file's text, token by token."""
    from selectkd.evals.perplexity import perplexity_compared, perplexity_row, surprises

    assert options.data is not None  # checked above
    settings = {"max_length": options.max_length, "dtype": options.dtype}
    found, rows, tokenizers = [], [], []
    for name in names:
        loaded = here.student(name, options.dtype)
        of_model = surprises(loaded, options.data, limit=options.limit, max_length=options.max_length)
        found.append((name, of_model))
        tokenizers.append(loaded.tokenizer.get_vocab())
        rows.append(perplexity_row(name, options.data, of_model, {**settings, "revision": loaded.revision}))
    pairs = [
        perplexity_compared(options.data.stem, found[i], found[j])
        for i, j in combinations(range(len(names)), 2)
        if tokenizers[i] == tokenizers[j]  # a token of another vocabulary is another unit
    ]
    return rows, pairs


def _judge_loader(options: EvalOptions, here: Here) -> Callable[[], Any]:
    """A function that loads the judge; ConfigError now for flags that cannot be."""
    from selectkd.evals.judging import EndpointJudge, ModelJudge
    from selectkd.teachers.remote.connection import Connection
    from selectkd.teachers.remote.secrets import key_of
    from selectkd.teachers.remote.settings import JUDGE

    flags, model = options.judge, options.judge.model
    if flags.url is None:
        return lambda: ModelJudge(here.student(str(model), options.dtype), flags.tokens)
    if model is None:
        raise ConfigError(f"--judge {flags.url} needs --judge-model, the name of the model there.")
    connection = Connection(flags.url, key_of(flags.key_variable, JUDGE.key), settings=JUDGE)
    return lambda: EndpointJudge(connection, model, flags.tokens)


def instruct(names: list[str], options: EvalOptions, here: Here) -> Results:
    """Answers to requests, which a judge compares with the references."""
    from selectkd.evals.judging import PROTOCOLS, cost, unasked
    from selectkd.evals.judging.instruct import answered, judged, read_requests
    from selectkd.evals.memory import Memory

    flags, load_judge = options.judge, _judge_loader(options, here)
    if flags.protocol not in PROTOCOLS:
        raise ConfigError(
            f"--protocol {flags.protocol} is not known.{did_you_mean(flags.protocol, PROTOCOLS)}"
        )
    assert options.data is not None  # checked above
    rules, requests = PROTOCOLS[flags.protocol], read_requests(options.data, options.limit)
    memory, pairs = Memory.opened(options.memory), {}
    for name in names:
        on_progress = lambda done, name=name: show_progress(f"{name}: {done} of {len(requests)} answers")  # noqa: E731
        pairs[name] = answered(
            here.student(name, options.dtype), requests, rules, seed=options.seed, batch_size=here.batch_size,
            memory=memory, on_progress=on_progress,
        )  # fmt: skip
    judge, rows, contests = load_judge(), [], {}
    todo = unasked([pair for of_model in pairs.values() for pair in of_model], judge.name, memory)
    questions = [one.text for one in todo.values()]
    into, out, dollars = cost(
        questions, price_in=flags.price_in, price_out=flags.price_out, tokens=judge.tokens
    )
    show_progress(
        f"{len(questions)} verdicts to ask for: about {into:,} tokens to read and at most {out:,} to write, "
        f"${dollars:.2f}"
    )
    if flags.max_cost is not None and dollars > flags.max_cost:
        raise ConfigError(
            f"${dollars:.2f} is above --max-cost {flags.max_cost:g}. Judge fewer requests with --limit."
        )
    settings = {"data": str(options.data), "protocol": flags.protocol, "dtype": options.dtype}
    for name, of_model in pairs.items():
        of_judge, contests[name] = judged(
            name, flags.protocol, of_model, judge, rules, memory=memory, seed=options.seed, settings=settings
        )
        rows += of_judge
    return rows, [_win_rates(flags.protocol, one, other, contests) for one, other in combinations(names, 2)]


def _win_rates(protocol: str, first: str, second: str, contests: dict[str, Any]) -> dict[str, Any]:
    """Two models' win rates, compared on the requests that both have a verdict for."""
    from selectkd.evals.statistics import paired_bootstrap

    both = [
        (one, two)
        for one, two in zip(contests[first].scores, contests[second].scores, strict=True)
        if one is not None and two is not None
    ]
    apart = paired_bootstrap([one for one, _ in both], [two for _, two in both])
    return {
        "task": protocol, "metric": "win_rate", "first": first, "second": second, "difference": apart.value,
        "low": apart.low, "high": apart.high, "p_bootstrap": apart.p, "n": apart.n,
    }  # fmt: skip


def vision(names: list[str], options: EvalOptions, here: Here) -> Results:
    """Questions about images: benchmarks of a folder, and drawn scenes."""
    from selectkd.evals.asking import Decoding
    from selectkd.evals.memory import Memory
    from selectkd.evals.vision.benchmarks import chosen_benchmarks
    from selectkd.evals.vision.leaderboard import average_row
    from selectkd.evals.vision.model import VisionModel
    from selectkd.evals.vision.run import VisionRun, run_tasks

    tasks = tuple(chosen_benchmarks(options.harness.tasks or "synthetic"))
    load_judge = _judge_loader(options, here) if "mmvet" in tasks else None
    run = VisionRun(
        tasks, options.data, options.limit, here.batch_size, options.seed, options.size, load_judge
    )
    files, memory = run.check(), Memory.opened(options.memory)
    scored: dict[str, list[Any]] = {}
    averages = []
    for name in names:
        model = VisionModel.of(name, Decoding(options.tokens), dtype=options.dtype, device=here.device)
        rows = run_tasks(name, files, model, run, memory, on_progress=show_progress)
        averages.append(average_row(name, rows, {"data": str(options.data)}))
        for one in rows:
            scored.setdefault(f"{one.task} {one.metric}", []).append(one)
    found, pairs = _kept_and_compared(scored, options.answers)
    return [*found, *(one for one in averages if one is not None)], pairs


SUITES: dict[str, Callable[[list[str], EvalOptions, Here], Results]] = {
    "own": own,
    "quick": problems,
    "math": problems,
    "code": problems,
    "perplexity": perplexity,
    "instruct": instruct,
    "harness": harness,
    "vision": vision,
}
