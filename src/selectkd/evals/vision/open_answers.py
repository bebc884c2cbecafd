"""Open answers by their published rules: MMMU's parts of a response, OCRBench's contained text."""

from __future__ import annotations

import re
from collections.abc import Sequence

from selectkd.evals.judging.question import without_thinking

INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""Words that MMMU's rule takes an answer to stand behind."""
NUMBERS = (
    r"-?\b\d{1,3}(?:,\d{3})+\b",
    r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
    r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
)
"""MMMU's numbers: with thousands separators, in scientific notation, plain."""
HANDWRITTEN_MATHEMATICS = "Handwritten Mathematical Expression Recognition"


def open_answer_matches(answer: str, right: Sequence[str]) -> bool | None:
    """MMMU's rule: whether one part of the response holds a right answer, or equals it as a number to two decimals.

    Parts: of each line what stands behind the last indicator ("is", "so", "answer", in the last line "="), the
    shortest of them, or the whole answer; and every number in them. None for an empty answer. The published rule
    lowers the case before it looks for the capital of a new sentence, so lines alone part an answer; so does this one.
    Source: Yue et al., MMMU (arXiv 2311.16502), its published ``parse_open_response`` and ``eval_open``.

    >>> open_answer_matches("The gain is 12.50 dB", ["12.5"]), open_answer_matches("It is a mitral valve", ["aortic"])
    (True, False)
    """
    text = without_thinking(answer).strip().strip(".").lower()
    if not text:
        return None
    parts = _parts(text)
    numbers = [one for part in parts for pattern in NUMBERS for one in re.findall(pattern, part)]
    given = [value for one in (*parts, *numbers) for value in _values(one)]
    wanted = [value for one in right for value in _values(one)]
    return any(
        any(isinstance(other, str) and other in one for other in wanted)
        if isinstance(one, str)
        else one in wanted
        for one in given
    )


def contains_text(answer: str, right: Sequence[str], category: str) -> bool | None:
    """OCRBench's rule: whether the answer holds one of the right texts; None for an empty answer.

    Case and line ends do not matter; of a handwritten mathematical expression case matters and spaces do not.
    Source: Liu et al., OCRBench (arXiv 2305.07895), its published evaluation.

    >>> contains_text("It says STOP!", ["Stop"], "Scene Text-centric VQA")
    True
    >>> contains_text("$x ^ 2 + Y$", ["x^2 + y"], HANDWRITTEN_MATHEMATICS)
    False
    """
    text = without_thinking(answer)
    if not text.strip():
        return None
    if category == HANDWRITTEN_MATHEMATICS:
        return any(_without_spaces(one) in _without_spaces(text) for one in right)
    return any(_one_line(one) in _one_line(text) for one in right)


def _parts(text: str) -> list[str]:
    lines, found = text.split("\n"), []
    for number, line in enumerate(lines):
        indicators = (*INDICATORS, "=") if number == len(lines) - 1 else INDICATORS
        tails = [line.split(one)[-1].strip() for one in indicators if one in line]
        shortest = min(tails, key=len, default="")
        if shortest and shortest not in ":,.!?;'":
            found.append(shortest)
    return found or [text]


def _values(text: str) -> list[str | float]:
    """A number to two decimals; a text in small letters, a single character with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _one_line(text: str) -> str:
    return text.lower().strip().replace("\n", " ")


def _without_spaces(text: str) -> str:
    return text.strip().replace("\n", " ").replace(" ", "")
