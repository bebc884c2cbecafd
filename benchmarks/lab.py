"""Small language models for studies on a processor: text, tokenizers, teachers, damaged teachers and warm students.

    python benchmarks/lab.py [--small] [--corpora code problems] [--teachers 1M 3M] [--students 0.2M]

Each corpus has a folder with train.jsonl, heldout.jsonl and its models: teacher-SIZE, teacher-SIZE-age-12 and so on
(copies of the teacher when it was younger), teacher-SIZE-wrong and teacher-SIZE-unsure (taught wrong tokens after the
tokens that noise.json names; of the first size of teachers alone), student-SIZE-sSEED (trained briefly, one for each
seed of a study; for problems also student-SIZE-cold-sSEED and student-SIZE-near-sSEED, trained for less and for
longer). What is there is not made again; a run that is killed goes on. models.json says of each model its parameters,
steps, tokens, seconds and held-out loss.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import lab_text
from lab_models import SIZES, Course, made, noisy_tokens, rows_of, train, wrong_after
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

FOLDER = Path(".cache/lab")
AGES = (0.12, 0.25, 0.5)
NOISE = 0.3
"""The share of positions at which a damaged teacher is wrong."""


@dataclass(frozen=True)
class Plan:
    """Records of a corpus, its vocabulary, and how long its models train. copies: as of ``made``."""

    records: int = 40_000
    heldout: int = 200
    vocabulary: int = 1024
    seeds: int = 6
    copies: bool = False
    teacher: Course = field(default_factory=lambda: Course(steps=1500, learning_rate=3e-3, ages=AGES))
    damage: Course = field(default_factory=lambda: Course(steps=300, learning_rate=1e-3))
    teachers: tuple[str, ...] = ("1M", "3M", "7M", "15M")
    """Sizes; the first has the damaged copies, and the students are made after it."""
    students: Mapping[str, Course] = field(
        default_factory=lambda: {"": Course(steps=150, learning_rate=3e-3)}
    )
    """What follows a student's size in its name -> how it was trained before a study."""


PLANS = {
    "code": Plan(),
    "instructions": Plan(),
    "problems": Plan(
        heldout=600, copies=True, teacher=Course(3000, 2e-3, ages=AGES, beta2=0.95),
        damage=Course(600, 1e-3, beta2=0.95), teachers=("1M", "0.5M", "3M", "7M", "15M"),
        students={
            "": Course(1000, 3e-3, beta2=0.95),
            "-cold": Course(100, 3e-3, beta2=0.95),
            "-near": Course(3000, 3e-3, beta2=0.95),
        },
    ),
}  # fmt: skip
SMALL = Plan(
    records=3000, heldout=40, vocabulary=512, teacher=Course(steps=300, learning_rate=5e-3, ages=(0.25,)),
    damage=Course(steps=40, learning_rate=2e-3), students={"": Course(steps=40, learning_rate=5e-3)}, seeds=2,
    teachers=("0.2M",),
)  # fmt: skip


def make(corpus: str, folder: Path, plan: Plan, teachers: Sequence[str], students: Sequence[str]) -> None:
    """Everything of one corpus that is not there yet. teachers, students: sizes, made in this order."""
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "train.jsonl"
    if not text.exists():
        records = lab_text.CORPORA[corpus](plan.records + plan.heldout, 0)
        lab_text.write(folder / "heldout.jsonl", records[: plan.heldout])
        lab_text.write(text, records[plan.heldout :])
    records, held = lab_text.read(text), lab_text.read(folder / "heldout.jsonl")
    if not (folder / "tokenizer").exists():
        lab_text.tokenizer_of(records, plan.vocabulary).save_pretrained(folder / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    alone = corpus in lab_text.DRAWN
    rows, heldout = (rows_of(tokenizer, some, completions_only=alone) for some in (records, held))
    for size in teachers:
        name, course = f"teacher-{size}", plan.teacher
        if plan.copies:  # a step of wide models is smaller, and Adam brings them no further than 3M
            width = SIZES[size].width
            course = replace(
                course, learning_rate=course.learning_rate * (128 / width) ** 0.5, muon=width > 300
            )
        elif SIZES[size].width > 200:
            course = replace(course, learning_rate=course.learning_rate / 2)
        model = made(SIZES[size], tokenizer, 0, copies=plan.copies)
        train(folder / name, model, tokenizer, rows, heldout, course)
        _summarise(folder)
        if size == teachers[0]:
            for seed in range(plan.seeds):
                for warm, (end, course) in product(students, plan.students.items()):
                    course = replace(course, seed=100 + seed)
                    model = made(SIZES[warm], tokenizer, course.seed, copies=plan.copies)
                    train(folder / f"student-{warm}{end}-s{seed}", model, tokenizer, rows, heldout, course)
            _damaged(folder, name, tokenizer, rows, heldout, plan)
            _summarise(folder)


def _damaged(folder: Path, name: str, tokenizer: Any, rows: Any, heldout: Any, plan: Plan) -> None:
    tokens = noisy_tokens(rows, NOISE, seed=7)
    (folder / "noise.json").write_text(json.dumps({"share": NOISE, "after": tokens}) + "\n", "utf-8")
    for kind in ("wrong", "unsure"):
        relabel = wrong_after(tokens, len(tokenizer), sure=kind == "wrong", seed=7)
        model = AutoModelForCausalLM.from_pretrained(folder / name)
        train(folder / f"{name}-{kind}", model.train(), tokenizer, rows, heldout, plan.damage, relabel)


def _summarise(folder: Path) -> None:
    """models.json: the end of every model's curve."""
    found = {}
    for curve in sorted(folder.glob("*/curve.jsonl")):
        with safe_open(curve.with_name("model.safetensors"), "pt") as weights:
            count = sum(weights.get_tensor(name).numel() for name in weights.keys())  # noqa: SIM118 - no mapping
        found[curve.parent.name] = {
            "parameters": count,
            **json.loads(curve.read_text("utf-8").splitlines()[-1]),
        }
    (folder / "models.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")


def main(arguments: Sequence[str]) -> int:
    """Makes the laboratory; returns 0."""
    disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a whole tiny laboratory, in about a minute")
    parser.add_argument("--corpora", nargs="+", choices=list(lab_text.CORPORA), default=["code", "problems"])
    parser.add_argument("--teachers", nargs="+", choices=list(SIZES))
    parser.add_argument("--students", nargs="+", choices=list(SIZES))
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args(arguments)
    folder = given.folder or (FOLDER / "small" if given.small else FOLDER)
    students = given.students or (["0.05M"] if given.small else ["0.2M", "0.5M", "1M"])
    for corpus in given.corpora:
        plan = SMALL if given.small else PLANS[corpus]
        make(corpus, folder / corpus, plan, given.teachers or plan.teachers, students)
        for name, model in json.loads((folder / corpus / "models.json").read_text("utf-8")).items():
            print(f"{corpus} {name}: {model['parameters']:,} parameters, {model['tokens']:,} tokens in "
                  f"{model['seconds']:.0f} s, held-out loss {model['heldout']:.3f}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
