"""``selectkd eval MODEL --suite SUITE``."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from selectkd.cli.answer import JsonFile, check_answer, write_answer
from selectkd.cli.options import ApiKeyEnv, Device
from selectkd.cli.terminal import say, show_progress, without_other_bars
from selectkd.errors import ConfigError
from selectkd.objective.registry import did_you_mean

if TYPE_CHECKING:
    from selectkd.evals.memory import Memory
    from selectkd.evals.suites import Suite
    from selectkd.models.load import Loaded

SuiteName = Literal["own", "quick", "math", "code", "instruct", "perplexity", "harness"]
MATH, QUICK_MATH, QUICK_CODE = 100, 20, 10
"""Problems where --limit names none: made problems have no end of their own."""


@dataclass(frozen=True)
class Asked:
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


def evaluate(
    model: Annotated[
        str, typer.Argument(help="A run folder, a model folder, a .gguf file or a model on the hub.")
    ],
    suite: Annotated[
        SuiteName | None,
        typer.Option(
            "--suite", help="What to measure. Default: own (held-out text) for a run folder, else quick."
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Another model to measure on the same problems. Repeatable."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="A file with the problems, texts or requests.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Use at most this many problems.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Maximum new tokens in each answer.")] = 256,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="code: programs to write for each problem.")
    ] = 1,
    k: Annotated[int, typer.Option("--k", min=1, help="code: the k in pass@k.")] = 1,
    temperature: Annotated[
        float,
        typer.Option("--temperature", min=0.0, help="code: sampling temperature. A single sample is greedy."),
    ] = 0.8,
    unsafe: Annotated[
        bool,
        typer.Option("--unsafe-exec", help="code: run programs even if this machine cannot isolate them."),
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option("--judge", help="instruct: URL of an OpenAI-compatible server with the judge model."),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option(
            "--judge-model", help="instruct: the judge model's name on that server, or a local model."
        ),
    ] = None,
    api_key_env: ApiKeyEnv = None,
    judge_tokens: Annotated[
        int,
        typer.Option(
            "--judge-tokens",
            min=1,
            help="instruct: maximum tokens for a verdict and the reasoning before it.",
        ),
    ] = 2048,
    protocol: Annotated[
        str, typer.Option("--protocol", help="instruct: alpaca_eval, evol_instruct or ultrafeedback.")
    ] = "alpaca_eval",
    memory: Annotated[
        Path,
        typer.Option(
            "--memory", help="A file that keeps answers and verdicts. A repeated command reuses them."
        ),
    ] = Path("eval-memory.jsonl"),
    price_in: Annotated[
        float, typer.Option("--price-in", min=0.0, help="instruct: dollars for a million input tokens.")
    ] = 0.0,
    price_out: Annotated[
        float, typer.Option("--price-out", min=0.0, help="instruct: dollars for a million output tokens.")
    ] = 0.0,
    max_cost: Annotated[
        float | None,
        typer.Option(
            "--max-cost", min=0.0, help="instruct: stop before spending more than this, in dollars."
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", min=1, help="Answers to generate at once. Default: 8, or 64 on an accelerator."
        ),
    ] = None,
    max_length: Annotated[
        int, typer.Option("--max-length", min=2, help="perplexity: maximum tokens of each text.")
    ] = 1024,
    dtype: Annotated[
        str, typer.Option("--dtype", help="The number format of the weights: float32 or bfloat16.")
    ] = "float32",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed for generated problems and for sampling.")
    ] = 0,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="Write every answer to a JSONL file.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", help="harness: tasks of lm-evaluation-harness, separated by commas."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option("--task-folder", help="harness: a folder with your own task files.")
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            "--shots", min=0, help="harness: examples before each problem. Default: the task's own number."
        ),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="harness: use the model's chat template, which is off by default.")
    ] = False,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure a model on a task and compare it with others.

    Results have confidence intervals; models are compared on the same problems.
    """
    check_answer(answers, flag="--answers")
    is_run = (Path(model).expanduser() / "manifest.json").is_file()
    if suite is None:
        suite = "own" if is_run else "quick"
    if suite == "own" and not is_run:
        raise ConfigError(
            f"--suite own measures the text a run held out, and {model} is no finished run's folder."
        )
    if k > samples:
        raise ConfigError(f"--k {k} needs --samples {k} or more; it is {samples}.")
    if suite in ("perplexity", "instruct") and data is None:
        raise ConfigError(f"--suite {suite} needs --data FILE.")
    if suite == "instruct" and judge is None and judge_model is None:
        raise ConfigError(
            "--suite instruct needs --judge URL with --judge-model NAME, or a local --judge-model."
        )
    if suite == "harness" and not tasks:
        raise ConfigError("--suite harness needs --tasks, for example --tasks hellaswag,arc_easy.")
    if memory.is_dir():
        raise ConfigError(
            f"--memory {memory} is a folder. Name a file, for example {memory / 'eval-memory.jsonl'}."
        )
    without_other_bars()

    from selectkd.models.devices import use_device

    on = use_device(device)
    if batch_size is None:  # the harness asks for whole rows of logits, which grow with it
        batch_size = 8 if on.type == "cpu" or suite == "harness" else 64
    asked = Asked(
        suite, data, limit, tokens, samples, k, temperature, batch_size, seed, unsafe, max_length, on
    )

    from selectkd.evals.memory import Memory

    names = [model, *(compare or [])]
    if suite == "own":
        from selectkd.evals.own_text import own_text
        from selectkd.evals.runs import load_student

        loaders = [(name, partial(load_student, name, dtype=dtype, device=on)) for name in names]
        rows, comparisons = own_text(
            model, loaders, limit=limit, batch_size=batch_size, device=on, heard=show_progress
        )
    elif suite == "perplexity":
        rows, comparisons = _perplexity(names, asked, dtype)
    elif suite == "instruct":
        voice = _judge(judge, judge_model, api_key_env, dtype, on, judge_tokens)
        budget = (price_in, price_out, max_cost)
        rows, comparisons = _instruct(names, asked, dtype, voice, protocol, Memory.opened(memory), budget)
    elif suite == "harness":
        chosen = tuple(one.strip() for one in str(tasks).split(","))
        kept = Memory.opened(memory)
        rows, comparisons = _harness(names, asked, dtype, answers, chosen, task_folder, shots, chat, kept)
    else:
        rows, comparisons = _problems(names, asked, dtype, answers, Memory.opened(memory))
    write_answer(json_file, {"rows": rows, "comparisons": comparisons})
    _table(rows, comparisons)


def _problems(
    names: list[str], asked: Asked, dtype: str, answers: Path | None, memory: Memory
) -> tuple[list[Any], list[Any]]:
    from selectkd.evals.run_suite import run_suite
    from selectkd.evals.runs import load_student

    suites = _suites(asked)
    scored: dict[str, list[Any]] = {one.task: [] for one in suites}
    for name in names:
        loaded = load_student(name, dtype=dtype, device=asked.device)
        for one in suites:
            scored[one.task].append(
                run_suite(name, loaded, one, batch_size=asked.batch_size, memory=memory, heard=show_progress)
            )
    return _kept_and_compared(scored, answers)


def _harness(
    names: list[str], asked: Asked, dtype: str, answers: Path | None, tasks: tuple[str, ...], folder: Path | None,
    shots: int | None, chat: bool, memory: Memory,
) -> tuple[list[Any], list[Any]]:  # fmt: skip
    from selectkd.evals.harness import Harness
    from selectkd.evals.runs import load_student

    harness = Harness(tasks, folder, shots, chat, asked.limit, asked.batch_size)
    manager = harness.prepared()
    scored: dict[str, list[Any]] = {}
    for name in names:
        for one in harness.run(
            name,
            load_student(name, dtype=dtype, device=asked.device),
            manager,
            memory=memory,
            heard=show_progress,
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


def _suites(asked: Asked) -> list[Suite]:
    """The problems of a suite; what is missing is said before a model loads."""
    from selectkd.evals.sandbox import require
    from selectkd.evals.suites import arithmetic, programming, written_mathematics

    made = []
    if asked.suite in ("math", "quick"):
        made.append(
            written_mathematics(asked.data, asked.limit, tokens=asked.tokens)
            if asked.data is not None and asked.suite == "math"
            else arithmetic(
                asked.limit or (QUICK_MATH if asked.suite == "quick" else 100),
                tokens=asked.tokens,
                seed=asked.seed,
            )
        )
    if asked.suite in ("code", "quick"):
        level = require(unsafe=asked.unsafe)
        show_progress(f"programs are locked in by {level}")
        made.append(
            programming(
                asked.data if asked.suite == "code" else None,
                asked.limit or (QUICK_CODE if asked.suite == "quick" else None),
                tokens=asked.tokens, level=level, samples=asked.samples, k=asked.k,
                temperature=asked.temperature, seed=asked.seed,
            )
        )  # fmt: skip
    return made


def _perplexity(names: list[str], asked: Asked, dtype: str) -> tuple[list[Any], list[Any]]:
    from selectkd.evals.perplexity import perplexity_compared, perplexity_row, surprises
    from selectkd.evals.runs import load_student

    assert asked.data is not None  # checked above
    settings = {"max_length": asked.max_length, "dtype": dtype}
    found, rows, tokenizers = [], [], []
    for name in names:
        loaded = load_student(name, dtype=dtype, device=asked.device)
        seen = surprises(loaded, asked.data, limit=asked.limit, max_length=asked.max_length)
        found.append((name, seen))
        tokenizers.append(loaded.tokenizer.get_vocab())
        rows.append(perplexity_row(name, asked.data, seen, {**settings, "revision": loaded.revision}))
    pairs = [
        perplexity_compared(asked.data.stem, found[i], found[j])
        for i, j in combinations(range(len(names)), 2)
        if tokenizers[i] == tokenizers[j]  # a token of another vocabulary is another unit
    ]
    return rows, pairs


def _judge(
    url: str | None, model: str | None, key_variable: str | None, dtype: str, device: Any, tokens: int
) -> Callable[[], Any]:
    """Who judges, as a function that makes it; what is wrong with the flags is said now."""
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


def _instruct(
    names: list[str],
    asked: Asked,
    dtype: str,
    voice: Callable[[], Any],
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
    assert asked.data is not None  # checked above
    rules, requests = PROTOCOLS[protocol], read_requests(asked.data, asked.limit)
    pairs = {}
    for name in names:
        loaded: Loaded = load_student(name, dtype=dtype, device=asked.device)
        heard = lambda done, name=name: show_progress(f"{name}: {done} of {len(requests)} answers")  # noqa: E731
        pairs[name] = answered(
            loaded, requests, rules, seed=asked.seed, batch_size=asked.batch_size, memory=memory, heard=heard
        )
    price_in, price_out, most = budget
    judge, rows, contests = voice(), [], {}
    todo = unasked([pair for of_model in pairs.values() for pair in of_model], judge.name, memory)
    questions = [one.text for one in todo.values()]
    into, out, dollars = cost(questions, price_in=price_in, price_out=price_out, tokens=judge.tokens)
    show_progress(
        f"{len(questions)} verdicts to ask for: about {into:,} tokens to read and at most {out:,} to write, "
        f"${dollars:.2f}"
    )
    if most is not None and dollars > most:
        raise ConfigError(f"${dollars:.2f} is above --max-cost {most:g}. Judge fewer requests with --limit.")
    settings = {"data": str(asked.data), "protocol": protocol, "dtype": dtype}
    for name, of_model in pairs.items():
        made, contests[name] = judged(
            name, protocol, of_model, judge, rules, memory=memory, seed=asked.seed, settings=settings
        )
        rows += made
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


def _table(rows: list[dict[str, Any]], comparisons: list[dict[str, Any]]) -> None:
    say(f"{'model':<34}{'task':<18}{'metric':<28}{'value':>9} {'[95%':>9} {']':>9} {'n':>6}")
    for row in rows:
        say(
            f"{row['model'][-33:]:<34}{row['task'][:17]:<18}{row['metric']:<28}{row['value']:>9.4f} {row['low']:>9.4f} "
            f"{row['high']:>9.4f} {row['n']:>6}"
        )
    for row in {json.dumps(row["settings"], sort_keys=True, default=str): row for row in rows}.values():
        say(f"settings of {row['task']}, {row['model']}: {json.dumps(row['settings'], default=str)}")
    for row in comparisons:
        test = (
            f", McNemar p {row['p_mcnemar']:.3g} ({row['only_first']} / {row['only_second']})"
            if "p_mcnemar" in row
            else ""
        )
        say(
            f"{row['task']}: {row['second']} minus {row['first']}: {row['difference']:+.4f} [{row['low']:+.4f}, "
            f"{row['high']:+.4f}], p {row['p_bootstrap']:.3g}{test}"
        )
