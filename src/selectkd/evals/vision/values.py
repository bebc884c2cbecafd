"""MathVista's free answers: an integer, a float of so many decimals, or a list, read without another model."""

from __future__ import annotations

import ast
import json
import re
from fractions import Fraction
from typing import Literal

from selectkd.errors import DataError
from selectkd.evals.judging.question import without_thinking
from selectkd.evals.numbers import (
    ANSWER_PHRASE,
    REASON,
    SENTENCE_END,
    final_number,
    last_boxed,
    numbers_of,
)
from selectkd.evals.vision.options import legible

Kind = Literal["integer", "float", "list"]
WORDS: dict[str, int] = dict(
    zip(
        (
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ),
        range(13),
        strict=True,
    )
)
STATED_WORD = re.compile(
    rf"(?:\banswer\s*(?:is|:)\s*:?\s*|\bthere\s+(?:is|are)\s+(?:exactly\s+|only\s+)?|^\W*)({'|'.join(WORDS)})\b(?![\s-]+(?:of|or|to|"
    r"hundred|thousand|million)\b)",
    re.IGNORECASE,
)
LAST_NUMBER = re.compile(r"[\d½¾¼}][\s)°%$€£\"']*(?:[A-Za-zµ°/²³^]+\d?[\s)]*){0,2}[.!\s]*$")
"""A text that ends on a number, with at most two words of a unit behind it."""
SEVERAL = re.compile(r"\d.*?(?:-|\u2013|\bto\b|\bor\b|\band\b).*?\d", re.IGNORECASE)
"""A range, or numbers to choose from."""
RESULT = re.compile(
    r"\b(?:so|thus|hence|therefore|totals?|altogether|is|are|equals|gives|makes|leaves)\b|=", re.IGNORECASE
)
"""What a result stands behind."""


def stated_number(answer: str) -> Fraction | None:
    r"""The number an answer gives; None where it gives none, or several and says of none that it is the answer.

    It counts in \boxed{}, behind "the answer is", as the only number there is, or as the result that the last sentence
    ends on; a number in words counts alone, behind "the answer is" and behind "there are".

    >>> stated_number("3 red and 4 blue, so 7."), stated_number("7 of the 12 are red"), stated_number("There are two.")
    (Fraction(7, 1), None, Fraction(2, 1))
    """
    text = without_thinking(answer).strip()
    plain = legible(text) if "\\boxed" not in text else text
    if last_boxed(text) is not None:
        return final_number(text)
    phrases, words = list(ANSWER_PHRASE.finditer(plain)), list(STATED_WORD.finditer(plain))
    if phrases:
        tail = SENTENCE_END.split(plain[phrases[-1].end() :], maxsplit=1)[0]
        if numbers_of(tail):
            several = SEVERAL.search(REASON.split(tail, maxsplit=1)[0].rpartition("=")[2])
            return None if several else final_number(plain)
        return _word(words[-1]) if words and words[-1].end() > phrases[-1].end() else None
    numbers = numbers_of(plain)
    if not numbers:
        return _word(words[-1]) if len({one[1].lower() for one in words}) == 1 else None
    return numbers[0] if len(set(numbers)) == 1 else _result(plain)


def _result(text: str) -> Fraction | None:
    """The one number behind the last "so", "is" or "=" of the last sentence, where that ends on it."""
    sentence = re.split(r"\n|(?<=[^\s.][.!?])\s", text)[-1]
    tail = RESULT.split(sentence)[-1] if RESULT.search(sentence) else ""
    numbers = numbers_of(tail)
    alone = len(numbers) == 1 and ", " not in tail
    return numbers[0] if alone and LAST_NUMBER.search(tail) else None


def stated_list(answer: str) -> list[Fraction] | None:
    """The numbers of the last list in square brackets; None without one.

    >>> stated_list("between them: [2007, 2008]"), stated_list("2007 and 2008")
    ([Fraction(2007, 1), Fraction(2008, 1)], None)
    """
    found = re.findall(r"\[([^\[\]]*)\]", legible(without_thinking(answer)))
    if not found:
        return None
    parts = [numbers_of(one) for one in found[-1].split(",")]
    return [one[0] for one in parts] if all(len(one) == 1 for one in parts) else None


def same_value(answer: str, reference: str, kind: Kind, decimals: int | None = None) -> bool | None:
    """Whether an answer has the value of the reference by MathVista's normalisation; None where no value can be read.

    integer: both cut to whole numbers; float: the answer is rounded to ``decimals``; list: number by number.
    Source: Lu et al., MathVista (arXiv 2310.02255), its published ``calculate_score``.

    >>> same_value("about 1.449", "1.45", "float", 2), same_value("14.0", "14", "integer"), same_value("?", "1", "list")
    (True, True, None)
    """
    if kind == "list":
        found = stated_list(answer)
        return None if found is None else found == _reference_list(reference)
    value = stated_number(answer)
    if value is None:
        return None
    right = numbers_of(reference)
    if len(right) != 1:
        raise DataError(
            f"the right answer {reference[:40]!r} is no number, and the question asks for a {kind}."
        )
    if kind == "integer":
        return int(value) == int(right[0])
    places = 1 if decimals is None else decimals
    return round(float(value), places) == round(float(right[0]), places)


def literal_list(text: str) -> list[str] | None:
    """The strings of a list written as Python or JSON; None for another text."""
    for read in (json.loads, ast.literal_eval):
        try:
            found = read(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(found, list | tuple):
            return [str(one) for one in found]
    return None


def _reference_list(reference: str) -> list[Fraction]:
    found = stated_list(reference)
    if found is None:
        raise DataError(
            f"the right answer {reference[:40]!r} is no list of numbers, and the question asks for one."
        )
    return found


def _word(found: re.Match[str]) -> Fraction:
    return Fraction(WORDS[found[1].lower()])
