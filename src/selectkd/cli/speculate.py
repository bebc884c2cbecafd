"""``selectkd speculate --draft STUDENT --target TEACHER``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.answer import STDOUT, JsonFile, check_answer, write_answer
from selectkd.cli.terminal import say, told, without_other_bars
from selectkd.errors import ConfigError

if TYPE_CHECKING:
    from selectkd.speculative.measure import Speculation


def speculate(
    draft: Annotated[
        list[str],
        typer.Option("--draft", help="The student: a run folder or a model. May stand several times."),
    ],
    target: Annotated[
        str, typer.Option("--target", help="The teacher: a folder, a .gguf file or a hub name.")
    ],
    before: Annotated[
        bool, typer.Option("--before", help="Also the student a run folder began with, for each --draft.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A file of records; three short prompts without one.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many prompts of the file.")] = 8,
    lengths: Annotated[
        str, typer.Option("--lengths", metavar="G,G,...", help="Draft lengths to try.")
    ] = "2,4,8",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="New tokens a prompt, at the most.")] = 64,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="Of the sampled rows; 0 leaves them out.")
    ] = 1.0,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the sampled rows.")] = 0,
    beside: Annotated[
        bool,
        typer.Option("--transformers/--no-transformers", help="Time transformers' assisted generation too."),
    ] = True,
    json_file: JsonFile = None,
) -> None:
    """How much faster the teacher writes with the student as its draft, and that it writes the same."""
    chosen = _lengths(lengths)
    check_answer(json_file)
    without_other_bars()

    import torch

    from selectkd.data import align
    from selectkd.demo import PROMPTS
    from selectkd.evals.prompts import prompt_ids, read_prompts
    from selectkd.evals.runs import load_student, load_student_before
    from selectkd.generation import ends_of
    from selectkd.models.load import load_model
    from selectkd.speculative.measure import assisted, speculation, timed_alone

    teacher = load_model(target, dtype=dtype)
    students = []
    for name in draft:
        if before:
            students.append((f"{name} before", load_student_before(name, dtype=dtype)))
        students.append((name, load_student(name, dtype=dtype)))
    for _, student in students:
        align(teacher.tokenizer, student.tokenizer)
    tokenizer = teacher.tokenizer
    texts = (
        [prompt_ids(one, tokenizer) for one in PROMPTS]
        if prompts is None
        else read_prompts(prompts, tokenizer, limit=limit)
    )
    ids = [torch.tensor(one) for one in texts]
    eos = ends_of(tokenizer, teacher.model)
    rows: list[dict[str, Any]] = []
    for heat in (0.0, temperature) if temperature else (0.0,):
        options: dict[str, Any] = {"max_new_tokens": tokens, "temperature": heat, "eos": eos}
        told(f"the target alone, temperature {heat:g}, {len(ids)} prompts")
        alone = timed_alone(teacher.model, ids, seed=seed, **options)
        for name, student in students:
            for g in chosen:
                told(f"{name}, draft length {g}, temperature {heat:g}")
                seen = speculation(
                    teacher.model, student.model, ids, draft_length=g, seed=seed, alone=alone, **options
                )
                theirs = (
                    assisted(teacher.model, student.model, ids, draft_length=g, seed=seed, **options)
                    if beside
                    else None
                )
                rows.append(_row(name, target, seen, theirs))
    settings = {
        "prompts": "built in" if prompts is None else str(prompts), "prompt_count": len(ids), "tokens": tokens,
        "dtype": dtype, "seed": seed, "threads": torch.get_num_threads(), "target_revision": teacher.revision,
    }  # fmt: skip
    last = [row for row in rows if row["draft"] == students[-1][0] and row["temperature"] == 0]
    write_answer(
        json_file, {**max(last, key=lambda row: row["speedup_measured"]), "rows": rows, "settings": settings}
    )
    if json_file != STDOUT:
        _table(rows)


def _lengths(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdecimal() and 1 <= int(part) <= 64 for part in parts):
        raise ConfigError(f"--lengths {text}: give draft lengths from 1 to 64, for example 2,4,8.")
    return [int(part) for part in parts]


def _row(draft: str, target: str, seen: Speculation, theirs: float | None) -> dict[str, Any]:
    return {
        "draft": draft,
        "target": target,
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


def _table(rows: list[dict[str, Any]]) -> None:
    say(
        f"{'draft':<32}{'T':>5}{'g':>4}{'accepted':>10}{'[95%':>7}{']':>6}{'a pass':>8}{'expected':>10}"
        f"{'by costs':>10}{'measured':>10}{'transformers':>14}  same tokens"
    )
    for row in rows:
        theirs = "" if row["speedup_transformers"] is None else f"{row['speedup_transformers']:.2f}"
        same = {True: "yes", False: "NO", None: "by law"}[row["exact"]]
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
