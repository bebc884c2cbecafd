"""A vision-language pair of our own: a teacher trained from scratch on drawn scenes, and students of half its layers.

    python benchmarks/vision_pair.py [--small] [--record]

.cache/vision-pair gets train.jsonl, heldout.jsonl and images/ (the text of a distillation), teacher, and student-sSEED,
cut from the teacher and trained briefly, one for each seed of studies/vision_pair.yaml. What is there is not made
again; a training that is killed goes on. MODEL.json says of each its parameters, steps, seconds, held-out loss, and its
accuracy by task on the synthetic suite with its image, with a blank one and with another scene's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lab_models import Course
from record import record
from transformers.utils.logging import disable_progress_bar
from vision_pair_models import SIZE, Size, model_of, part_of, processor_of, texts_of, tokenizer_of, train

from selectkd.evals.asking import Decoding
from selectkd.evals.memory import Memory
from selectkd.evals.vision.model import VisionModel
from selectkd.evals.vision.synthetic import run_synthetic, write_scenes

FOLDER = Path(".cache/vision-pair")
METRICS = ("option_accuracy", "yes_no_accuracy")
TOKENS, AT_ONCE = 16, 48
"""Tokens of an answer, and answers written at once."""


@dataclass(frozen=True)
class Plan:
    """Scenes of each task in the text of a distillation, held out and in the suite; sizes and courses of the models.

    student_layers: of the language model and of the tower.
    """

    scenes: int
    heldout: int
    asked: int
    seeds: int
    teacher_size: Size
    student_layers: tuple[int, int]
    teacher: Course
    student: Course


WHOLE = Plan(
    scenes=600, heldout=20, asked=20, seeds=3, teacher_size=Size(64, 3, 64, 4), student_layers=(2, 2),
    teacher=Course(steps=4000, learning_rate=3e-3), student=Course(steps=20, learning_rate=2e-3),
)  # fmt: skip
SMALL = Plan(
    scenes=4, heldout=2, asked=2, seeds=1, teacher_size=Size(16, 1, 32, 2), student_layers=(1, 1),
    teacher=Course(steps=16, learning_rate=5e-3), student=Course(steps=4, learning_rate=5e-3),
)  # fmt: skip


def make(folder: Path, plan: Plan, wanted: Sequence[str] | None = None) -> dict[str, Any]:
    """Everything that is not there yet, of the models those wanted; gives what is known of each."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "heldout.jsonl").exists():
        write_scenes(folder, train=plan.scenes, heldout=plan.heldout, size=SIZE, answers="text")
    processor = processor_of(tokenizer_of(texts_of()))
    found = {}
    for name, course in _models(plan):
        if wanted and name not in wanted:
            continue
        if name == "teacher":
            model = model_of(plan.teacher_size, processor.tokenizer, course.seed)
        else:
            model = part_of(folder / "teacher", *plan.student_layers)
        train(folder / name, model, processor, course, plan.heldout)
        found[name] = {
            **_curve(folder / name),
            "parameters": model.num_parameters(),
            **_asked(folder / name, plan),
        }
        (folder / f"{name}.json").write_text(json.dumps(found[name], indent=1) + "\n", "utf-8")
    return found


def _models(plan: Plan) -> list[tuple[str, Course]]:
    students = [
        (f"student-s{seed}", replace(plan.student, seed=100 + seed)) for seed in range(1, plan.seeds + 1)
    ]
    return [("teacher", plan.teacher), *students]


def _curve(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "curve.jsonl").read_text("utf-8").splitlines()[-1])


def _asked(folder: Path, plan: Plan) -> dict[str, Any]:
    """{metric: {task: [value, low, high, questions]}} of the suite, from what was answered before where it was."""
    model = VisionModel.of(folder, Decoding(TOKENS), dtype="float32")
    memory = Memory.opened(folder.with_name("answers.jsonl"))
    rows = run_synthetic(folder.name, model, memory, scenes=plan.asked, size=SIZE, batch_size=AT_ONCE)
    return {
        metric: {
            row.task: [
                round(row.interval.value, 4),
                round(row.interval.low, 4),
                round(row.interval.high, 4),
                row.interval.n,
            ]
            for row in rows
            if row.metric == metric
        }
        for metric in METRICS
    }


def main(arguments: Sequence[str]) -> int:
    """Makes the pair; returns 0."""
    disable_progress_bar()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="a whole tiny pair that learns nothing, in seconds"
    )
    parser.add_argument("--record", action="store_true", help="add the accuracies to results.csv")
    parser.add_argument("--models", nargs="+", help="these alone, so that two processes can share the work")
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the models are small: one thread is as fast as two
    folder = given.folder or (FOLDER / "small" if given.small else FOLDER)
    found = make(folder, SMALL if given.small else WHOLE, given.models)
    rows = []
    for name, model in found.items():
        print(f"{name}: {model['parameters']:,} parameters, {model['step']} steps in {model['seconds']:.0f} s, "
              f"held-out loss {model['heldout']:.3f}")  # fmt: skip
        for metric in METRICS:
            print(
                f"  {metric}: "
                + ", ".join(f"{task} {value:.2f}" for task, (value, *_) in model[metric].items())
            )
            rows += [
                (task, name, metric, value, f"[{low:.3f}, {high:.3f}]", n)
                for task, (value, low, high, n) in model[metric].items()
            ]
    if given.record:
        record("vision_pair", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
