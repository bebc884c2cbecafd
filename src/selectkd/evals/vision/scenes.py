"""Drawn scenes with questions whose answers are known: count, colour, place, words, bars.

A scene is a function of (seed, split, task, index) alone, so an image is drawn when it is asked for and never stored.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from selectkd.data.images import pillow

Split = Literal["train", "heldout", "test"]
COLOURS = {
    "red": (214, 39, 40), "blue": (31, 99, 200), "green": (34, 139, 34), "yellow": (240, 200, 20),
    "purple": (128, 50, 160), "orange": (250, 130, 20), "black": (20, 20, 20), "grey": (130, 130, 130),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle")
PLACES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
BACKGROUND = (250, 250, 250)
MOST, OPTIONS = 8, 4
"""The largest count, and the options of a question."""
CONSONANTS, VOWELS = "BDFGKLMNPRSTVZ", "AEIOU"


@dataclass(frozen=True)
class Scene:
    """What is drawn and asked. right, wrong: texts of options; claims: the statement that is true and one that is not;
    caption: all that is drawn, in words.

    draw: the image, encoded as PNG.
    """

    task: str
    index: int
    question: str
    right: str
    wrong: tuple[str, ...]
    claims: tuple[str, str]
    caption: str
    picture: Callable[[Any], None] = field(repr=False, compare=False)
    size: int = 224

    def draw(self) -> bytes:
        """The scene as a PNG of ``size`` x ``size``; the same scene gives the same pixels."""
        Image, ImageDraw, _ = _pillow()
        image = Image.new("RGB", (self.size, self.size), BACKGROUND)
        self.picture(ImageDraw.Draw(image))
        return _png(image)


def scene(task: str, index: int, *, seed: int = 0, split: Split = "test", size: int = 224) -> Scene:
    """The scene of a task at an index; the three splits draw from streams of their own."""
    draw = random.Random(f"{seed}/{split}/{task}/{index}")
    question, right, wrong, claims, caption, picture = TASKS[task](draw, size)
    return Scene(task, index, question, right, tuple(wrong), claims, caption, picture, size)


def blank(size: int = 224) -> bytes:
    """An image of the background alone."""
    Image, _, _ = _pillow()
    return _png(Image.new("RGB", (size, size), BACKGROUND))


Parts = tuple[str, str, list[str], tuple[str, str], str, Callable[[Any], None]]
"""question, right option, wrong options, (true, false) statement as a question, caption, and what draws it."""


def _count(draw: random.Random, size: int) -> Parts:
    # four numbers in a row, of which any may be right: no option looks more likely than another
    lowest = draw.randint(1, MOST - OPTIONS + 1)
    number, shape, colour = lowest + draw.randrange(OPTIONS), draw.choice(SHAPES), draw.choice(list(COLOURS))
    cells = draw.sample([(x, y) for x in range(3) for y in range(3)], number)
    step, radius = size / 3, size / 9
    centres = [(step * (x + 0.5), step * (y + 0.5)) for x, y in cells]
    centres = [(x + draw.uniform(-1, 1) * size / 30, y + draw.uniform(-1, 1) * size / 30) for x, y in centres]
    wrong = [one for one in range(lowest, lowest + OPTIONS) if one != number]
    draw.shuffle(wrong)

    def picture(canvas: Any) -> None:
        for centre in centres:
            _shape(canvas, shape, centre, radius, COLOURS[colour])

    ask = f"Are there exactly {{}} {shape}s in the image?"
    claims = ask.format(number), ask.format(draw.choice(wrong))
    question, caption = f"How many {shape}s are in the image?", f"{number} {colour} {shape}s"
    return question, str(number), list(map(str, wrong)), claims, caption, picture


def _colour(draw: random.Random, size: int) -> Parts:
    shapes, colours = draw.sample(SHAPES, 2), draw.sample(list(COLOURS), OPTIONS)
    turned = draw.random() < 0.5
    heights = [draw.uniform(0.3, 0.7) * size for _ in shapes]

    def picture(canvas: Any) -> None:
        for number, (shape, colour, y) in enumerate(zip(shapes, colours, heights, strict=False)):
            x = size * (0.27 if (number == 0) != turned else 0.73)
            _shape(canvas, shape, (x, y), size / 6.5, COLOURS[colour])

    # the other shape's colour is always among the wrong ones
    ask = f"Is the {shapes[0]} {{}}?"
    claims = ask.format(colours[0]), ask.format(colours[1])
    named = [f"{colour} {shape}" for colour, shape in zip(colours, shapes, strict=False)]
    caption = ", ".join(reversed(named) if turned else named)
    return f"What is the colour of the {shapes[0]}?", colours[0], colours[1:], claims, caption, picture


def _place(draw: random.Random, size: int) -> Parts:
    (first, second), place = draw.sample(SHAPES, 2), draw.choice(list(PLACES))
    colours = draw.sample(list(COLOURS), 2)
    across, down = PLACES[place]
    middle = [size * draw.uniform(0.42, 0.58) for _ in range(2)]
    apart = size * draw.uniform(0.24, 0.3)
    places = [(middle[0] + sign * across * apart, middle[1] + sign * down * apart) for sign in (1, -1)]

    def picture(canvas: Any) -> None:
        for shape, colour, centre in zip((first, second), colours, places, strict=True):
            _shape(canvas, shape, centre, size / 9, COLOURS[colour])

    wrong = [one for one in PLACES if one != place]
    opposite = next(one for one in PLACES if PLACES[one] == (-across, -down))
    ask = f"Is the {first} {{}} the {second}?"
    question = f"Where is the {first}, seen from the {second}?"
    claims = ask.format(place), ask.format(opposite)
    texts = {one: f"{one} the {second}" for one in PLACES}
    caption = f"{colours[0]} {first} {place} the {colours[1]} {second}"
    return question, texts[place], [texts[one] for one in wrong], claims, caption, picture


def _word(draw: random.Random, size: int) -> Parts:
    letters = [draw.choice(CONSONANTS if place % 2 == 0 else VOWELS) for place in range(draw.choice((3, 5)))]
    # all options differ from each other in one place, so that none is the one the others are made from
    place = draw.randrange(len(letters))
    here = draw.sample(CONSONANTS if place % 2 == 0 else VOWELS, OPTIONS)
    word, *wrong = ("".join([*letters[:place], one, *letters[place + 1 :]]) for one in here)
    colour = draw.choice(["red", "blue", "green", "black", "purple"])
    spot = size * draw.uniform(0.45, 0.55), size * draw.uniform(0.3, 0.7)

    def picture(canvas: Any) -> None:
        canvas.text(spot, word, fill=COLOURS[colour], font=_font(size / 5), anchor="mm")

    ask = "Is the word in the image {}?"
    claims = ask.format(word), ask.format(wrong[0])
    return "Which word is written in the image?", word, wrong, claims, word, picture


def _bars(draw: random.Random, size: int) -> Parts:
    names = draw.sample("KLMNPQRSTUVWXYZ", OPTIONS)  # no letter of an option
    heights = draw.sample(range(2, 11), OPTIONS)
    colours = draw.sample(list(COLOURS), OPTIONS)
    tallest = max(zip(heights, names, strict=True))[1]
    floor, unit, width = size * 0.84, size * 0.074, size / (OPTIONS + 1)

    def picture(canvas: Any) -> None:
        canvas.line((size * 0.06, floor, size * 0.94, floor), fill=(0, 0, 0), width=max(1, size // 112))
        for number, (name, height, colour) in enumerate(zip(names, heights, colours, strict=True)):
            x = width * (number + 1)
            box = x - width * 0.3, floor - height * unit, x + width * 0.3, floor
            canvas.rectangle(box, fill=COLOURS[colour])
            canvas.text((x, floor + size * 0.08), name, fill=(0, 0, 0), font=_font(size / 11), anchor="mm")

    wrong = [one for one in names if one != tallest]
    other = draw.choice(wrong)
    claims = f"Is bar {tallest} taller than bar {other}?", f"Is bar {other} taller than bar {tallest}?"
    caption = ", ".join(f"bar {name} {height}" for name, height in zip(names, heights, strict=True))
    return (
        "Which bar is the tallest?",
        f"bar {tallest}",
        [f"bar {one}" for one in wrong],
        claims,
        caption,
        picture,
    )


TASKS: Mapping[str, Callable[[random.Random, int], Parts]] = {
    "count": _count, "colour": _colour, "place": _place, "words": _word, "bars": _bars,
}  # fmt: skip


def _shape(canvas: Any, shape: str, centre: tuple[float, float], radius: float, colour: Any) -> None:
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    else:
        canvas.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=colour)


def _font(size: float) -> Any:
    """Pillow's own font, which needs no file."""
    return _pillow()[2].load_default(size)


def _png(image: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _pillow() -> tuple[Any, Any, Any]:
    Image, _ = pillow()
    from PIL import ImageDraw, ImageFont

    return Image, ImageDraw, ImageFont
