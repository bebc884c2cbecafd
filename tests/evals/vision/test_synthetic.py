"""Drawn scenes: their answers, their controls, and the files they make."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from scipy.stats import chisquare

from selectkd.errors import ConfigError
from selectkd.evals.memory import Memory
from selectkd.evals.vision.asking import Message
from selectkd.evals.vision.benchmarks import grade_option, grade_yes_no, with_options, yes_no
from selectkd.evals.vision.options import chosen_option
from selectkd.evals.vision.scenes import BACKGROUND, COLOURS, TASKS, Scene, blank, scene
from selectkd.evals.vision.synthetic import asked_about, questions_of, run_synthetic, write_scenes

SIZE, SCENES = 96, 6


class Seeing:
    """Knows each image of the suite, and answers what is asked from it; of an image it does not know, A and yes."""

    identity = ("sees",)

    def __init__(self) -> None:
        self.scenes = {
            one.draw(): one for task in TASKS for one in (scene(task, at, size=SIZE) for at in range(SCENES))
        }

    def __call__(self, chats: Sequence[list[Message]]) -> list[str]:
        return [
            self.answer(*(part.get("image", part.get("text")) for part in chat[0]["content"]))
            for chat in chats
        ]

    def answer(self, image: bytes, text: str) -> str:
        one, asked = self.scenes.get(image), text.splitlines()[0]
        if asked.startswith(("Is ", "Are ")):
            return "Yes." if one is None or asked == one.claims[0] else "No."
        lines = dict(line.split(". ", 1) for line in text.splitlines()[1:-1])
        right = [letter for letter, option in lines.items() if one is not None and option == one.right]
        return f"The answer is {right[0] if right else 'A'}."


class Blind(Seeing):
    """Answers A and yes to everything."""

    identity = ("blind",)

    def __init__(self) -> None:
        self.scenes = {}


def test_a_model_that_sees_is_right_with_its_image_and_at_chance_without(tmp_path: Path) -> None:
    rows = run_synthetic("m", Seeing(), Memory(tmp_path / "memory.jsonl"), scenes=SCENES, size=SIZE)
    values = {(row.task, row.metric): row.interval.value for row in rows}
    assert len(rows) == len(values) == 5 * 3 * 4
    for task in TASKS:
        assert [
            values[task, metric]
            for metric in ("option_accuracy", "all_rotations", "yes_no_accuracy", "both_polarities")
        ] == [1.0] * 4
        assert (
            values[f"{task} (blank)", "option_accuracy"] == 0.25
            and values[f"{task} (blank)", "all_rotations"] == 0.0
        )
        assert (
            values[f"{task} (blank)", "yes_no_accuracy"] == 0.5
            and values[f"{task} (blank)", "both_polarities"] == 0.0
        )
        assert values[f"{task} (shuffled)", "all_rotations"] < 1.0
    assert all(row.interval.low <= row.interval.value <= row.interval.high for row in rows)


def test_a_model_that_does_not_see_is_at_chance_whatever_it_is_shown(tmp_path: Path) -> None:
    chance = {"option_accuracy": 0.25, "all_rotations": 0.0, "yes_no_accuracy": 0.5, "both_polarities": 0.0}
    rows = run_synthetic("m", Blind(), Memory(tmp_path / "memory.jsonl"), scenes=3, size=SIZE)
    assert all(row.interval.value == chance[row.metric] for row in rows)
    with pytest.raises(ConfigError, match="2 or more"):
        run_synthetic("m", Blind(), Memory(tmp_path / "memory.jsonl"), scenes=1)


@pytest.mark.parametrize("task", TASKS)
def test_a_scene_is_a_function_of_its_seed_and_its_rotations_name_the_right_option(task: str) -> None:
    one = scene(task, 5, seed=3, size=SIZE)
    assert one == scene(task, 5, seed=3, size=SIZE) and one.draw() == scene(task, 5, seed=3, size=SIZE).draw()
    assert one.draw() not in (
        scene(task, 5, seed=4, size=SIZE).draw(),
        scene(task, 5, seed=3, split="train", size=SIZE).draw(),
    )
    turns, (true, false) = questions_of(one, b"")
    assert sorted(turn.answer for turn in turns) == ["A", "B", "C", "D"]
    for turn in turns:
        assert (
            turn.options[turn.answer] == one.right and chosen_option(one.right, turn.options) == turn.answer
        )
    assert (true.answer, false.answer) == ("yes", "no") and true.text != false.text


def test_what_is_drawn_is_what_is_right() -> None:
    for at in range(12):
        counted, coloured, placed = (scene(task, at, size=SIZE) for task in ("count", "colour", "place"))
        assert pieces(counted) == int(counted.right)
        x, y = middles(placed)
        across, down = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}[
            placed.right.split()[0]
        ]
        assert (x * across, y * down) >= (0, 0) and (abs(x) > abs(y)) == bool(across), placed.right
        shown = {colour for _, colour in pixels(coloured).getcolors() if colour != BACKGROUND}  # type: ignore[union-attr]
        assert shown == {COLOURS[coloured.right], COLOURS[coloured.wrong[0]]}


def pixels(one: Scene) -> Image.Image:
    return Image.open(io.BytesIO(one.draw()))


def pieces(one: Scene) -> int:
    """How many regions of one colour a scene has, counted by filling each."""
    from PIL import ImageDraw

    image, found = pixels(one), 0
    for at in range(image.width * image.height):
        place = at % image.width, at // image.width
        if image.getpixel(place) != BACKGROUND:
            ImageDraw.floodfill(image, place, BACKGROUND)
            found += 1
    return found


def middles(one: Scene) -> tuple[float, float]:
    """The first shape's place minus the second's. The first one's colour is found by its shape's filled part."""
    image = np.asarray(pixels(one))
    first, second = one.question.split("the ")[1].split(",")[0], one.question.rstrip("?").split("the ")[-1]
    places = {}
    for colour in COLOURS.values():
        mask = (image == colour).all(-1)
        if not mask.any():
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        filled = mask.sum() / (len(rows) * len(columns))
        shape = "square" if filled > 0.95 else "circle" if filled > 0.65 else "triangle"
        places[shape] = columns.mean(), rows.mean()
    return places[first][0] - places[second][0], places[first][1] - places[second][1]


def test_no_option_is_likelier_to_those_who_read_the_options_alone() -> None:
    many = 600
    ranks = Counter(sorted([int(one.right), *map(int, one.wrong)]).index(int(one.right))
                    for one in (scene("count", at) for at in range(many)))  # fmt: skip
    assert chisquare([ranks[rank] for rank in range(4)]).pvalue > 1e-3
    for at in range(40):
        one = scene("words", at)
        texts = [one.right, *one.wrong]
        apart = {sum(a != b for a, b in zip(x, y, strict=True)) for x in texts for y in texts if x != y}
        assert apart == {1}, "an option that all others are one letter away from is the right one"


@pytest.mark.parametrize("answers", ["letter", "text"])
def test_the_answers_of_a_pair_are_right_by_the_rules_that_grade_them(
    answers: Literal["letter", "text"],
) -> None:
    for one in (scene(task, at, size=SIZE) for task in TASKS for at in range(8)):
        image = one.draw()
        turns, claims = questions_of(one, image)
        asked, claimed = asked_about(one, image, answers=answers)
        turn = next(each for each in turns if with_options(each) == asked[0])
        claim = next(each for each in claims if yes_no(each) == claimed[0])
        assert grade_option(turn, asked[1]) is True and grade_yes_no(claim, claimed[1]) is True
        assert (asked[1] == one.right) == claimed[1].startswith(f"{one.right}: ") == (answers == "text")


def test_the_files_of_a_pair_are_whole_disjoint_and_the_same_each_time(tmp_path: Path) -> None:
    first = write_scenes(tmp_path / "a", train=4, heldout=2, size=SIZE)
    again = write_scenes(tmp_path / "b", train=4, heldout=2, size=SIZE)
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    images: list[set[bytes]] = []
    for path, count in zip(first, (4, 2), strict=True):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == 5 * count * 2 and Counter(line["task"] for line in lines) == dict.fromkeys(
            TASKS, count * 2
        )
        images.append(
            {(tmp_path / "a" / line["messages"][0]["content"][0]["image"]).read_bytes() for line in lines}
        )
        assert {line["messages"][1]["content"][0]["text"] for line in lines} <= {
            "A",
            "B",
            "C",
            "D",
            "Yes",
            "No",
        }
    suite = {scene(task, at, size=SIZE).draw() for task in TASKS for at in range(4)}
    assert not images[0] & images[1] and not (images[0] | images[1]) & suite
    assert Image.open(io.BytesIO(blank(SIZE))).getcolors() == [(SIZE * SIZE, BACKGROUND)]
