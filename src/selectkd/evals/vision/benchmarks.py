"""The eight benchmarks of the Open VLM Leaderboard: how each is asked, graded and put together, one row each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectkd.errors import ConfigError, DataError
from selectkd.evals.vision.open_answers import contains_text, open_answer_matches
from selectkd.evals.vision.options import chosen_option
from selectkd.evals.vision.questions import Question
from selectkd.evals.vision.values import literal_list, same_value
from selectkd.evals.vision.yes_no import yes_or_no
from selectkd.objective.registry import did_you_mean

Grade = Callable[[Question, str], bool | None]
"""(question, answer) -> right or wrong; None where the answer cannot be read."""
LETTER_PROMPT, YES_NO_PROMPT = "Answer with the letter of the right option.", "Answer yes or no."


@dataclass(frozen=True)
class Benchmark:
    """files: what the name of its file begins with, in small letters. metrics: name of a metric -> the grouping whose
    questions must all be right, None for each question by itself. ask: the text of a question. grade None: a judge
    grades. circular: every rotation of the options is asked. split: records of another one are left out.
    """

    files: tuple[str, ...]
    metrics: Mapping[str, str | None]
    ask: Callable[[Question], str]
    grade: Grade | None
    circular: bool = False
    split: str | None = None


def with_options(question: Question) -> str:
    """A question with its hint and options, and what to answer."""
    hint = question.fields.get("hint")
    lines = [f"Hint: {hint}"] if hint else []
    lines.append(question.text)
    if question.options:
        lines += [f"{letter}. {text}" for letter, text in question.options.items()] + [LETTER_PROMPT]
    return "\n".join(lines)


def plainly(question: Question) -> str:
    """A question as it stands."""
    return question.text


def yes_no(question: Question) -> str:
    """A question, and that yes or no is wanted."""
    return f"{question.text}\n{YES_NO_PROMPT}"


def mathvista(question: Question) -> str:
    """MathVista's own query, which says what kind of answer is wanted, or the question with its options."""
    return question.text if "Hint:" in question.text else with_options(question)


def grade_option(question: Question, answer: str) -> bool | None:
    """Whether the answer names the right option."""
    found = chosen_option(answer, question.options)
    return None if found is None else found == question.answer


def grade_mmmu(question: Question, answer: str) -> bool | None:
    """An option, or MMMU's rule for an open question, whose right answers may be a list."""
    if question.options:
        return grade_option(question, answer)
    right = literal_list(question.answer) if question.answer.startswith("[") else None
    return open_answer_matches(answer, right or [question.answer])


def grade_mathvista(question: Question, answer: str) -> bool | None:
    """An option, or a value of the kind the question asks for."""
    if question.options:
        return grade_option(question, answer)
    kind, decimals = str(question.fields.get("answer_type")), question.fields.get("precision")
    if kind not in ("integer", "float", "list"):
        raise DataError(f"{question.origin}: answer_type {kind!r}; MathVista's are integer, float and list.")
    try:
        places = None if decimals in (None, "") else int(float(decimals))  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise DataError(f"{question.origin}: precision {decimals!r} is no number.") from error
    return same_value(answer, question.answer, kind, places)  # pyright: ignore[reportArgumentType]


def grade_text(question: Question, answer: str) -> bool | None:
    """Whether the answer holds one of the right texts."""
    right = literal_list(question.answer) or [question.answer]
    category = str(question.fields.get("category") or question.fields.get("question_type") or "")
    if not all(one.strip() for one in right):
        raise DataError(f"{question.origin}: an empty right answer, which every answer holds.")
    return contains_text(answer, right, category)


def grade_yes_no(question: Question, answer: str) -> bool | None:
    """Whether the answer says the right one of yes and no, which a file may write as 1 and 0."""
    right = {"1": "yes", "0": "no"}.get(question.answer.strip(), question.answer.strip().lower())
    if right not in ("yes", "no"):
        raise DataError(
            f"{question.origin}: the right answer {question.answer[:40]!r} is neither yes nor no."
        )
    found = yes_or_no(answer)
    return None if found is None else found == right


EACH: Mapping[str, str | None] = {"accuracy": None}
BENCHMARKS: dict[str, Benchmark] = {
    "mmbench": Benchmark(
        ("mmbench",), {"circular_accuracy": "rotations"}, with_options, grade_option, circular=True
    ),
    "mmstar": Benchmark(("mmstar",), EACH, with_options, grade_option),
    "mmmu": Benchmark(("mmmu",), EACH, with_options, grade_mmmu, split="validation"),
    "mathvista": Benchmark(("mathvista",), EACH, mathvista, grade_mathvista),
    "ocrbench": Benchmark(("ocrbench",), EACH, plainly, grade_text),
    "ai2d": Benchmark(("ai2d",), EACH, with_options, grade_option),
    "hallusionbench": Benchmark(
        ("hallusionbench",), {"aAcc": None, "fAcc": "figure", "qAcc": "question"}, yes_no, grade_yes_no
    ),
    "mmvet": Benchmark(("mmvet", "mm-vet"), {"score": None}, plainly, None),
}
"""The leaderboard's eight, in its order of columns but for MMVet, which a judge grades."""


def messages(question: Question, text: str) -> list[dict[str, Any]]:
    """A user's turn: images where the text says ``<image 1>`` (MMMU), else all of them before the text."""
    named = list(re.finditer(r"<image (\d)>", text))
    if not named:
        parts: list[dict[str, Any]] = [{"type": "image", "image": one} for one in question.images]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    parts, last = [], 0
    for found in named:
        number = int(found[1])
        if not 1 <= number <= len(question.images):
            raise DataError(
                f"{question.origin}: the text has <image {number}>, and there are {len(question.images)}."
            )
        before = text[last : found.start()]
        parts += [{"type": "text", "text": before}] if before.strip() else []
        parts.append({"type": "image", "image": question.images[number - 1]})
        last = found.end()
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text[last:]}]}]


def chosen_benchmarks(names: str) -> list[str]:
    """Names of benchmarks of a comma-separated text; ConfigError for one that is not known."""
    found = [one.strip().lower() for one in names.split(",") if one.strip()]
    for one in found:
        if one not in (*BENCHMARKS, "synthetic"):
            raise ConfigError(
                f"--tasks {one} is not known.{did_you_mean(one, BENCHMARKS)} What would work: "
                f"{', '.join(BENCHMARKS)} or synthetic."
            )
    return list(dict.fromkeys(found))


def file_of(name: str, folder: Path) -> Path:
    """The file or subfolder of a benchmark in ``folder``, found by its name; ConfigError unless there is just one."""
    if not folder.is_dir():
        raise ConfigError(f"--data {folder} is no folder. Name the folder with the benchmarks' files.")
    bare = lambda path: re.sub(r"[^a-z0-9-]", "", path.name.lower())  # noqa: E731
    starts = BENCHMARKS[name].files
    found = sorted(
        path for path in folder.iterdir() if bare(path).startswith(starts) and not path.name.startswith(".")
    )
    if len(found) != 1:
        seen = ", ".join(path.name for path in found) or "none"
        raise ConfigError(
            f"{folder}: {name} needs one file or folder whose name begins with {starts[0]}, not: {seen}."
        )
    return found[0]
