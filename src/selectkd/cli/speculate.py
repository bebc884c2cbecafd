"""``selectkd study speculate --draft STUDENT --target TEACHER``, and ``--server URL --target TEACHER``."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.options import ApiKeyEnv, Device, Dtype
from selectkd.cli.terminal import say, show_progress, without_other_bars
from selectkd.errors import ConfigError

if TYPE_CHECKING:
    from selectkd.evals.speculative.measure import Speculation
    from selectkd.evals.speculative.served import Served
    from selectkd.models.load import Loaded
    from selectkd.rollouts.completion_server import CompletionServer


@dataclass(frozen=True)
class Trial:
    """What every draft and server writes: at most ``tokens`` behind each prompt, at each temperature."""

    target: str
    prompts: list[list[int]]
    temperatures: tuple[float, ...]
    tokens: int
    seed: int
    ends: Collection[int]


def speculate(
    target: Annotated[
        str, typer.Option("--target", help="The teacher: a folder, a .gguf file or a model on the hub.")
    ],
    draft: Annotated[
        list[str] | None,
        typer.Option("--draft", help="The student: a run folder or a model. Repeatable."),
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="Also measure the student of each run folder before training.")
    ] = False,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A file of records to take prompts from. Default: three built-in prompts."
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Maximum number of prompts from the file.")
    ] = 8,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="G,G,...", help="Draft lengths to try, separated by commas.")
    ] = "2,4,8",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Maximum new tokens for each prompt.")] = 64,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature",
            min=0.0,
            help="Temperature for sampling, measured beside greedy decoding. 0 leaves sampling out.",
        ),
    ] = 1.0,
    dtype: Dtype = "float32",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed for sampling.")] = 0,
    beside: Annotated[
        bool,
        typer.Option(
            "--transformers/--no-transformers", help="Also time assisted generation of transformers."
        ),
    ] = True,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="A server that speculates. Only the tokenizer of --target is used then.",
        ),
    ] = None,
    plain_server: Annotated[
        str | None,
        typer.Option(
            "--plain-server",
            metavar="URL",
            help="A server with the same model but no draft, to compare with.",
        ),
    ] = None,
    server_model: Annotated[
        str | None,
        typer.Option("--server-model", help="The target's name on the servers. SGLang needs none."),
    ] = None,
    server_kind: Annotated[
        Literal["vllm", "sglang", "openai"],
        typer.Option(
            "--server-kind",
            help="Where counts come from: vLLM's /metrics, SGLang's answers, or nowhere (openai).",
        ),
    ] = "vllm",
    api_key_env: ApiKeyEnv = None,
    at_once: Annotated[
        int, typer.Option("--concurrency", min=1, help="Prompts to send to a server at once.")
    ] = 1,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure speculative decoding with the student as draft.

    It reports the speed-up and whether the output stays the same.
    """
    chosen = _lengths(lengths)
    if not draft and server is None:
        raise ConfigError("name a student with --draft, or a server that speculates with --server URL.")
    if plain_server is not None and server is None:
        raise ConfigError(f"--plain-server {plain_server} is what --server is compared with. Name that too.")
    if server is not None and server_model is None and server_kind != "sglang":
        raise ConfigError(f"--server {server} needs --server-model, the target's name there.")
    from selectkd.teachers.remote.secrets import key_of
    from selectkd.teachers.remote.settings import SPECULATE

    key = key_of(api_key_env, SPECULATE.key)
    without_other_bars()

    import torch

    from selectkd.cli.demo_pair import PROMPTS
    from selectkd.evals.prompts import prompt_ids, read_prompts
    from selectkd.models.devices import use_device
    from selectkd.models.load import load_model, load_tokenizer
    from selectkd.rollouts.completion_server import CompletionServer
    from selectkd.rollouts.generate import ends_of

    on = use_device(device)
    teacher = load_model(target, dtype=dtype).on(on) if draft else None
    tokenizer = load_tokenizer(target) if teacher is None else teacher.tokenizer
    texts = (
        [prompt_ids(one, tokenizer) for one in PROMPTS]
        if prompts is None
        else read_prompts(prompts, tokenizer, limit=limit)
    )
    ends = ends_of(tokenizer) if teacher is None else ends_of(tokenizer, teacher.model)
    trial = Trial(target, texts, (0.0, temperature) if temperature else (0.0,), tokens, seed, ends)
    rows: list[dict[str, Any]] = []
    if teacher is not None:
        students = _students(draft or [], before, dtype, on)
        rows += _here(teacher, students, trial, chosen, beside)
    if server is not None:
        servers = [
            CompletionServer(url, server_model or "", key, concurrency=at_once, settings=SPECULATE)
            for url in (server, plain_server)
            if url is not None
        ]
        rows += _there(servers, server_kind, trial, tokenizer)
    settings = {
        "prompts": "built in" if prompts is None else str(prompts), "prompt_count": len(texts), "tokens": tokens,
        "dtype": dtype, "seed": seed, "threads": torch.get_num_threads(), "device": str(on),
        "target_revision": None if teacher is None else teacher.revision, "server_kind": server and server_kind,
        "concurrency": server and at_once,
    }  # fmt: skip
    last = [row for row in rows if row["draft"] == rows[-1]["draft"] and row["temperature"] == 0]
    best = max(last, key=lambda row: row["speedup_measured"] or 0.0)
    write_answer(json_file, {**best, "rows": rows, "settings": settings})
    _table([row for row in rows if row["server"] is None])
    _served_table([row for row in rows if row["server"] is not None])


def _students(drafts: list[str], before: bool, dtype: str, device: Any) -> list[tuple[str, Loaded]]:
    """The drafts by name, each behind itself before training where that is wanted."""
    from selectkd.evals.runs import load_student, load_student_before

    students = []
    for name in drafts:
        if before:
            students.append((f"{name} before", load_student_before(name, dtype=dtype, device=device)))
        students.append((name, load_student(name, dtype=dtype, device=device)))
    return students


def _here(
    teacher: Loaded, students: list[tuple[str, Loaded]], trial: Trial, lengths: list[int], beside: bool
) -> list[dict[str, Any]]:
    """A row for each temperature, student and draft length, with the models in memory."""
    import torch

    from selectkd.data.alignment import align
    from selectkd.evals.speculative.measure import assisted, speculation, timed_alone

    for _, student in students:
        align(teacher.tokenizer, student.tokenizer)
    on = next(teacher.model.parameters()).device
    ids, rows = [torch.tensor(one, device=on) for one in trial.prompts], []
    for heat in trial.temperatures:
        options: dict[str, Any] = {
            "max_new_tokens": trial.tokens, "temperature": heat, "eos": trial.ends, "seed": trial.seed,
        }  # fmt: skip
        show_progress(f"the target alone, temperature {heat:g}, {len(ids)} prompts")
        alone = timed_alone(teacher.model, ids, **options)
        for name, student in students:
            for g in lengths:
                show_progress(f"{name}, draft length {g}, temperature {heat:g}")
                models = (teacher.model, student.model, ids)
                found = speculation(*models, draft_length=g, alone=alone)
                theirs = assisted(*models, draft_length=g, **options) if beside else None
                rows.append(_row(name, trial.target, found, theirs))
    return rows


def _there(servers: list[CompletionServer], kind: Any, trial: Trial, tokenizer: Any) -> list[dict[str, Any]]:
    """A row for each temperature, with the models that the first server holds; the second, if any, has no draft."""
    from selectkd.evals.speculative.served import served
    from selectkd.rollouts.generate import Request

    requests, rows = [Request(one, trial.tokens) for one in trial.prompts], []
    for heat in trial.temperatures:
        found = []
        for one in servers:
            show_progress(f"{one.url}, temperature {heat:g}, {len(requests)} prompts")
            found.append(
                served(
                    one, kind, requests, tokenizer=tokenizer, end=min(trial.ends, default=None),
                    temperature=heat, seed=trial.seed,
                )
            )  # fmt: skip
        rows.append(_served_row([one.url for one in servers], trial.target, heat, *found))
    return rows


def _lengths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise ConfigError(f"--lengths {text}: give draft lengths from 1 to 64, for example 2,4,8.")
    return [int(part) for part in parts]


def _row(draft: str, target: str, seen: Speculation, theirs: float | None) -> dict[str, Any]:
    return {
        "draft": draft,
        "target": target,
        "server": None,
        "temperature": seen.temperature,
        "draft_length": seen.draft_length,
        "acceptance": seen.acceptance.value,
        "acceptance_low": seen.acceptance.low,
        "acceptance_high": seen.acceptance.high,
        "acceptance_by_position": seen.by_position,
        "mean_accepted_length": seen.mean_accepted_length,
        "speedup_measured": seen.speedup_measured,
        "speedup_expected": seen.speedup_expected,
        "speedup_from_costs": seen.speedup_from_costs,
        "speedup_transformers": theirs,
        "cost_ratio": seen.costs.ratio,
        "seconds": asdict(seen.costs),
        "new_tokens": seen.tokens,
        "exact": seen.same,
    }


def _served_row(
    urls: list[str], target: str, heat: float, seen: Served, plain: Served | None = None
) -> dict[str, Any]:
    counts = seen.counts
    return {
        "draft": "the server's",
        "target": target,
        "server": urls[0],
        "plain_server": urls[1] if urls[1:] else None,
        "temperature": heat,
        "acceptance": counts and counts.acceptance,
        "acceptance_by_position": counts and counts.by_position,
        "accepted_of_drafted": counts and counts.of_drafted,
        "mean_accepted_length": counts and counts.mean_accepted_length,
        "not_published": seen.not_published,
        "tokens_per_second": seen.pace,
        "plain_tokens_per_second": plain and plain.pace,
        "speedup_measured": plain and seen.pace / plain.pace,
        "speedup_expected": None,
        "new_tokens": seen.tokens,
        "exact": None if plain is None or heat else seen.texts == plain.texts,
    }


def _served_table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return

    def shown(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    say(
        f"{'server':<32}{'T':>5}{'accepted':>10}{'of drafted':>12}{'per pass':>10}{'tokens/s':>10}{'plain':>9}"
        f"{'measured':>10}  same tokens"
    )
    for row in rows:
        same = (
            "-" if row["plain_server"] is None else {True: "yes", False: "NO", None: "sampled"}[row["exact"]]
        )
        say(
            f"{row['server'][-31:]:<32}{row['temperature']:>5g}{shown(row['acceptance'], 3):>10}"
            f"{shown(row['accepted_of_drafted'], 3):>12}{shown(row['mean_accepted_length'], 2):>8}"
            f"{row['tokens_per_second']:>10.1f}{shown(row['plain_tokens_per_second'], 1):>9}"
            f"{shown(row['speedup_measured'], 2):>10}  {same}"
        )
    for reason in dict.fromkeys(row["not_published"] for row in rows if row["not_published"]):
        say(f"no acceptance from {rows[0]['server']}: {reason}")
    if rows[0]["plain_server"] is None:
        say(
            "no speed-up and no comparison of texts without --plain-server URL, the same model served without a draft"
        )
    if any(row["exact"] is False for row in rows):
        say(
            "NO: the two servers' greedy texts differ. They round differently, or do not serve the same model."
        )


def _table(rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    say(
        f"{'draft':<32}{'T':>5}{'g':>4}{'accepted':>10}{'[95%':>7}{']':>6}{'per pass':>10}{'expected':>10}"
        f"{'by costs':>10}{'measured':>10}{'transformers':>14}  same tokens"
    )
    for row in rows:
        theirs = "" if row["speedup_transformers"] is None else f"{row['speedup_transformers']:.2f}"
        same = {True: "yes", False: "NO", None: "sampled"}[row["exact"]]
        say(
            f"{row['draft'][-31:]:<32}{row['temperature']:>5g}{row['draft_length']:>4}{row['acceptance']:>10.3f}"
            f"{row['acceptance_low']:>7.3f}{row['acceptance_high']:>6.3f}{row['mean_accepted_length']:>8.2f}"
            f"{row['speedup_expected']:>10.2f}{row['speedup_from_costs']:>10.2f}{row['speedup_measured']:>10.2f}"
            f"{theirs:>14}  {same}"
        )
    if any(row["exact"] is False for row in rows):
        say(
            "NO: a pass over several tokens rounds differently from passes over one, and two tokens that were all but "
            "equal changed places."
        )
