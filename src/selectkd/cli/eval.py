"""``selectkd eval MODEL --suite SUITE``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from selectkd.cli import eval_suites
from selectkd.cli.answer import JsonFile, check_answer, write_answer
from selectkd.cli.options import ApiKeyEnv, Device, Dtype
from selectkd.cli.terminal import say, without_other_bars
from selectkd.errors import ConfigError

SuiteName = Literal["own", "quick", "math", "code", "instruct", "perplexity", "harness", "vision"]


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
        Path | None,
        typer.Option(
            "--data",
            help="A file with the problems, texts or requests; vision: the folder with the benchmarks' files.",
        ),
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
    dtype: Dtype = "float32",
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed for generated problems and for sampling.")
    ] = 0,
    answers: Annotated[
        Path | None, typer.Option("--answers", help="Write every answer to a JSONL file.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            help="harness: tasks of lm-evaluation-harness; vision: benchmarks, or synthetic. Separated by commas.",
        ),
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
    size: Annotated[int, typer.Option("--size", min=32, help="vision: pixels across a drawn scene.")] = 224,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure a model on a task and compare it with others.

    Results have confidence intervals; models are compared on the same problems.
    """
    check_answer(answers, flag="--answers")
    is_run = (Path(model).expanduser() / "manifest.json").is_file()
    chosen: str = suite or ("own" if is_run else "quick")
    if chosen == "own" and not is_run:
        raise ConfigError(
            f"--suite own measures the text a run held out, and {model} is no finished run's folder."
        )
    judging = eval_suites.JudgeOptions(
        judge, judge_model, api_key_env, judge_tokens, protocol, price_in, price_out, max_cost
    )
    harness = eval_suites.HarnessOptions(tasks, task_folder, shots, chat)
    options = eval_suites.EvalOptions(
        chosen, data, limit, tokens, samples, k, temperature, unsafe, max_length, dtype, seed, answers, memory,
        judging, harness, size,
    )  # fmt: skip
    eval_suites.check(options)
    without_other_bars()

    from selectkd.models.devices import use_device

    on = use_device(device)
    if batch_size is None:  # the harness asks for whole rows of logits, which grow with it
        batch_size = 8 if on.type == "cpu" or chosen == "harness" else 64
    here = eval_suites.Here(on, batch_size)
    rows, comparisons = eval_suites.SUITES[chosen]([model, *(compare or [])], options, here)
    write_answer(json_file, {"rows": rows, "comparisons": comparisons})
    _table(rows, comparisons)


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
