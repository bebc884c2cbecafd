"""The synthetic suite: drawn scenes asked in every rotation and both polarities, with blank and other images beside.

The same scenes are the text of a small pair of models: ``write_scenes`` makes its files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

from selectkd.data.durable import sync_folder, write_plain, write_whole
from selectkd.errors import ConfigError
from selectkd.evals.memory import Memory
from selectkd.evals.run_suite import Scores
from selectkd.evals.vision.asking import Answerer, Graded, Problem, graded, scores_of
from selectkd.evals.vision.benchmarks import grade_option, grade_yes_no, messages, with_options, yes_no
from selectkd.evals.vision.questions import Question, rotated
from selectkd.evals.vision.scenes import TASKS, Scene, Split, blank, scene

Shown = Literal["image", "blank", "shuffled"]
Answers = Literal["letter", "text"]
"""letter: of the right option, and Yes or No; text: the option's own, which the rules read too, and what is seen before
yes or no, as in ``red: no``."""
SCENES = 40
"""Scenes of each task where nothing says how many: 6 questions each."""
OPTION_METRICS = {"option_accuracy": None, "all_rotations": "rotations"}
YES_NO_METRICS = {"yes_no_accuracy": None, "both_polarities": "polarities"}


def run_synthetic(
    name: str,
    answerer: Answerer,
    memory: Memory | None,
    *,
    scenes: int = SCENES,
    seed: int = 0,
    size: int = 224,
    batch_size: int = 8,
    on_progress: Callable[[str], None] | None = None,
) -> list[Scores]:
    """Four metrics of each task with its image, with a blank one, and with that of another scene of the task.

    size: pixels across a scene. memory: keeps the answers; None keeps none.
    A model that does not see is right on a quarter of the options and half of the yes-or-no questions, and its rows of
    blank and shuffled images are those of the image. ConfigError for fewer than 2 scenes: none could be another's.
    """
    if scenes < 2:
        raise ConfigError(
            f"{scenes} scene of each task: the control with another scene's image needs 2 or more."
        )
    rows = []
    for shown in ("image", "blank", "shuffled"):
        for task in TASKS:
            found = graded(
                _problems(task, scenes, shown, seed, size), answerer, batch_size=batch_size, memory=memory,
                on_progress=None
                if on_progress is None
                else lambda done, of=f"{name}, {task} ({shown})": on_progress(f"{of}: {done} answers"),
            )  # fmt: skip
            settings = {"scenes": scenes, "data_seed": seed, "size": size, "shown": shown}
            rows += _scored(name, task if shown == "image" else f"{task} ({shown})", found, settings)
    return rows


def questions_of(one: Scene, image: bytes, *, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """(the rotations of a scene's question, its true and its false statement as yes-or-no questions)."""
    order = hashlib.blake2b(f"{seed}/{one.task}/{one.index}".encode(), digest_size=2).digest()[0]
    texts = list(one.wrong)
    texts.insert(order % (len(texts) + 1), one.right)
    options = dict(zip("ABCDEFGH", texts, strict=False))
    right = next(letter for letter, text in options.items() if text == one.right)
    index, origin = str(one.index), f"{one.task}:{one.index}"
    whole = Question(origin, index, one.question, right, (image,), options)
    claims = [
        Question(origin, f"{index}{answer}", text, answer, (image,), groups={"polarities": index})
        for text, answer in zip(one.claims, ("yes", "no"), strict=True)
    ]
    return rotated(whole), claims


def asked_about(
    one: Scene, image: bytes, *, seed: int = 0, answers: Answers = "letter"
) -> list[tuple[str, str]]:
    """[(text of a question, its answer)] of a scene: one rotation and one statement, drawn by its index and image."""
    turns, claims = questions_of(one, image, seed=seed)
    turn = turns[one.index % len(turns)]
    claim = claims[hashlib.blake2b(image, digest_size=16).digest()[0] % 2]
    if answers == "text":
        return [(with_options(turn), one.right), (yes_no(claim), f"{one.right}: {claim.answer}")]
    return [(with_options(turn), turn.answer), (yes_no(claim), claim.answer.capitalize())]


def write_scenes(
    folder: Path, *, train: int, heldout: int, seed: int = 0, size: int = 224, answers: Answers = "letter"
) -> tuple[Path, Path]:
    """Writes train.jsonl, heldout.jsonl and images/ into a folder; gives the two files.

    train, heldout: scenes of each task. A line is messages with an image part (its path in the folder) and text, asked
    as ``run_synthetic`` asks: one rotation and one statement of a scene, drawn by its index. No image stands in both
    files, and neither's scenes are those of the suite. A file is whole or not there, its images before it.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    paths = []
    splits: tuple[tuple[Split, int], ...] = (("train", train), ("heldout", heldout))
    for split, count in splits:
        lines = [
            {"messages": [_turn("user", text, name), _turn("assistant", answer)], "task": one.task}
            for task in TASKS
            for one, image, name in _written(folder, task, split, count, seed, size, seen)
            for text, answer in asked_about(one, image, seed=seed, answers=answers)
        ]
        sync_folder(folder / "images")  # together: a sync for each of thousands takes minutes
        paths.append(folder / f"{split}.jsonl")
        write_whole(paths[-1], "".join(json.dumps(line) + "\n" for line in lines).encode())
    return paths[0], paths[1]


def _written(
    folder: Path, task: str, split: Split, count: int, seed: int, size: int, seen: set[bytes]
) -> Iterator[tuple[Scene, bytes, str]]:
    """(scene, image, its path in the folder) of ``count`` scenes, each image written; none is held out that is seen."""
    index = written = 0
    while written < count:
        one, index = scene(task, index, seed=seed, split=split, size=size), index + 1
        image = one.draw()
        digest = hashlib.blake2b(image, digest_size=16).digest()
        if split == "heldout" and digest in seen:
            continue
        seen.add(digest)
        name = f"images/{split}-{task}-{one.index}.png"
        write_plain(folder / name, image)
        yield one, image, name
        written += 1


def _turn(role: str, text: str, image: str | None = None) -> dict[str, Any]:
    parts = [] if image is None else [{"type": "image", "image": image}]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}]}


def _problems(task: str, scenes: int, shown: Shown, seed: int, size: int) -> Iterator[Problem]:
    for index in range(scenes):
        one = scene(task, index, seed=seed, size=size)
        # the next scene's image: every scene has another one's, and each image is shown once
        other = one if shown == "image" else scene(task, (index + 1) % scenes, seed=seed, size=size)
        image = blank(size) if shown == "blank" else other.draw()
        turns, claims = questions_of(one, image, seed=seed)
        for question in turns:
            grade = partial(grade_option, question)
            yield Problem(
                question.origin, messages(question, with_options(question)), grade, dict(question.groups)
            )
        for question in claims:
            grade = partial(grade_yes_no, question)
            yield Problem(question.origin, messages(question, yes_no(question)), grade, dict(question.groups))


def _scored(name: str, task: str, found: list[Graded], settings: dict[str, Any]) -> list[Scores]:
    options = [one for one in found if "rotations" in one.groups]
    claims = [one for one in found if "polarities" in one.groups]
    return [
        *scores_of(name, task, options, dict(OPTION_METRICS), settings),
        *scores_of(name, task, claims, dict(YES_NO_METRICS), settings),
    ]
