"""How many held-out problems each model of the laboratory solves, and the curves of its training.

    python benchmarks/lab_solved.py [--folder .cache/lab/problems] [--record] [--figure docs/figures/lab-curves.svg]

A problem counts as solved where the greedy completion ends with its answer. Held-out problems that have a twin in the
text that the models learned from, see ``lab_text.twin``, are left out. Intervals: Wilson's, 95%; of students over all
seeds together.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lab_text
from lab_models import LENGTH
from record import Row, record
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from selectkd.data.durable import write_plain
from selectkd.evals.statistics import wilson
from selectkd.rollouts.generate import Request, ends_of, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling

ANSWER = 48
"""Tokens of a completion at most."""


def kind_of(name: str) -> str:
    """A model's name without its seed."""
    return re.sub(r"-s\d+$", "", name)


def solved(model: Any, tokenizer: Any, problems: Sequence[dict[str, Any]]) -> dict[str, list[bool]]:
    """Task -> whether each of its problems is solved."""
    prompts = tokenizer([one["prompt"] for one in problems])["input_ids"]
    requests = [Request(tuple(ids), min(ANSWER, 4 * LENGTH - len(ids))) for ids in prompts]
    ends = ends_of(tokenizer, model)
    written = generate([model], requests, Draw(Sampling(0.0, 1.0)), ends=ends, width=len(tokenizer))
    found: dict[str, list[bool]] = {}
    for one, answer in zip(problems, written, strict=True):
        text = tokenizer.decode([token for token in answer.ids if token not in ends])
        found.setdefault(one["task"], []).append(text.strip().split(" = ")[-1] == one["answer"])
    return found


def draw(folder: Path, file: Path) -> None:
    """The held-out loss of every teacher, and of each kind of student's first seed, over its tokens."""
    import io

    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for curve in sorted(folder.glob("*/curve.jsonl")):
        name = curve.parent.name
        if re.search(r"-s[1-9]\d*$|-age-|-wrong$|-unsure$", name):
            continue
        looks = [json.loads(line) for line in curve.read_text("utf-8").splitlines()]
        line = "-" if name.startswith("teacher") else ":"
        axis.plot(
            [look["step"] for look in looks], [look["heldout"] for look in looks], line, label=kind_of(name)
        )
    axis.set(xlabel="step", ylabel="held-out loss, nats a token", yscale="log")
    axis.legend(fontsize=8)
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "selectkd"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    write_plain(file, drawn.getvalue())


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each kind of model; returns 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".cache/lab/problems"))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args(arguments)
    disable_progress_bar()
    known = {lab_text.twin(one) for one in lab_text.read(given.folder / "train.jsonl")}
    held = lab_text.read(given.folder / "heldout.jsonl")
    problems = [one for one in held if lab_text.twin(one) not in known]
    for task in lab_text.TASKS:
        each, left = (sum(one["task"] == task for one in some) for some in (held, problems))
        print(f"{task}: {left} of {each} held-out problems have no twin in the text")
    of_kind: dict[str, list[dict[str, list[bool]]]] = {}
    for folder in sorted(one.parent for one in given.folder.glob("*/curve.jsonl")):
        if "cache" not in folder.name:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
            tokenizer = AutoTokenizer.from_pretrained(folder)
            of_kind.setdefault(kind_of(folder.name), []).append(solved(model, tokenizer, problems))
    rows: list[Row] = []
    for kind, models in of_kind.items():
        told = []
        for task in lab_text.TASKS:
            right = [one for model in models for one in model.get(task, [])]
            share = wilson(sum(right), len(right))
            told.append(f"{task} {share.value:.2f}")
            rows.append(
                (kind, task, "solved", share.value, f"{share.low:.3g}..{share.high:.3g}", len(models))
            )
        print(f"{kind} ({len(models)}): {', '.join(told)}", flush=True)
    if given.record:
        record("lab solved", rows)
    if given.figure is not None:
        draw(given.folder, given.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
