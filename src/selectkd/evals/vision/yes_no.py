"""Yes or no: what an answer says, and HallusionBench's three accuracies."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from selectkd.evals.judging.question import without_thinking
from selectkd.evals.vision.options import legible

BOTH = re.compile(r"\byes\s*(?:/|or|and|\|)\s*no\b|\bno\s*(?:/|or|and|\|)\s*yes\b")
STATED = re.compile(
    r"\b(?:final\s+answer|answer)\s*(?:is|:|=|would\s+be|should\s+be)\s*:?\s*[\"'(]*(yes|no)\b(?!\s+\w)"
)
WORD = re.compile(r"\b(?:yes|no)\b")
BEFORE_NO = re.compile(r"(?:\bnot|\bneither|n't)\s+(?:a\s+)?$")
AFTER_NO = re.compile(
    r"\s+(?!(?:it|there|they|the|this|that|these|those|he|she|we|you|i|because|since|as)\b)\w"
)
"""A word after ``no`` that makes it a determiner: "no people", "no longer", "no one"."""


def yes_or_no(answer: str) -> str | None:
    """``yes`` or ``no`` where the answer holds one of the words and not the other; None otherwise.

    A word counts as an answer: in "no people" or "no longer" it does not, nor in "yes or no". "The answer is no"
    outweighs words before it.

    >>> yes_or_no("**Yes**, it is."), yes_or_no("There are no people."), yes_or_no("yes or no: no")
    ('yes', None, 'no')
    """
    text = BOTH.sub(" ", legible(without_thinking(answer)).casefold())
    stated = STATED.findall(text)
    if stated:
        return stated[-1]
    words = {
        found[0]
        for found in WORD.finditer(text)
        if not BEFORE_NO.search(text[: found.start()])
        and not (found[0] == "no" and AFTER_NO.match(text, found.end()))
    }
    return words.pop() if len(words) == 1 else None


def all_right(scores: Sequence[float], groups: Iterable[str]) -> list[float]:
    """1 for each group whose scores are all 1, else 0; groups in the order in which they first stand.

    With the figure of each question as its group the mean is HallusionBench's fAcc, with its text qAcc.
    Source: Guan et al., HallusionBench (arXiv 2310.14566), section 4.

    >>> all_right([1.0, 0.0, 1.0], ["a", "a", "b"])
    [0.0, 1.0]
    """
    found: dict[str, list[float]] = defaultdict(list)
    for score, group in zip(scores, groups, strict=True):
        found[group].append(score)
    return [float(all(one == 1.0 for one in of)) for of in found.values()]
