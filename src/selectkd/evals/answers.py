"""Final answers: found in a model's text, and compared with the right one."""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction

from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError

NUMBER = re.compile(r"-?\$?\s?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:\s?/\s?\d+)?|-?\$?\s?\.\d+")
LONGEST_NUMBER = 300
"""Characters: more digits are no answer, and Python refuses to read a few thousand."""
MARKED = re.compile(r"####[ \t]*(?![^\S\n]*\d+\.[ \t]+\S)(?=[-*$£€\\(\[ \t]*[\d.])")
"""GSM8K's mark before a number; a heading of Markdown, ``#### 3. Add them`` or ``#### Step 3``, is none."""
SAID = re.compile(r"(?:final answer|answer)(?:\s+is|\s*[:=])\s*:?\s*", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|[.!?;](?:\s|$)")


def final_number(text: str) -> Fraction | None:
    r"""The number a text ends on, as GSM8K's answers are read: after the last ``####`` that a number follows, in the
    last \boxed{}, after the last "answer is", else the last number of all; None where there is none. Thousands' commas,
    a currency sign, a percent sign and a final full stop do not matter; 1/2 and 0.5 are the same number.

    >>> final_number("She pays 3 x $400. #### $1,200."), final_number("2, so the answer is -1/2"), final_number("no")
    (Fraction(1200, 1), Fraction(-1, 2), None)
    """
    marked = list(MARKED.finditer(text))
    if marked:
        return _number(text[marked[-1].end() :], first=True)
    boxed = last_boxed(text)
    if boxed is not None:
        return _number(boxed.replace("\\frac", "").replace("}{", "/").strip("{}"), first=False)
    said = list(SAID.finditer(text))
    if said:
        sentence = SENTENCE_END.split(text[said[-1].end() :], maxsplit=1)[0]
        if (found := _number(sentence, first=True)) is not None:
            return found
    return _number(text, first=False)


def same_number(answer: str, reference: str) -> bool:
    """Whether ``answer`` ends on the number ``reference`` ends on. False where either has none.

    >>> same_number("6 * 7 = 42.", "work ... #### 42"), same_number("about 42.1", "#### 42")
    (True, False)
    """
    right = final_number(reference)
    return right is not None and final_number(answer) == right


def same_mathematics(answer: str, reference: str) -> bool:
    r"""Whether two MATH-style answers mean the same, by math-verify: of each the last \boxed{}, or its plain LaTeX."""
    check_math_verify()
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    boxed, said = last_boxed(reference), last_boxed(answer)
    gold = parse(f"${boxed if boxed is not None else reference}$")
    # math-verify would take several boxes of one answer together
    return bool(gold) and bool(verify(gold, parse(answer if said is None else f"\\boxed{{{said}}}")))


def check_math_verify() -> None:
    """ConfigError unless math-verify is installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            f"MATH-style answers are compared by math-verify. Install it: {how_to_install('math')}."
        )


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...}, its own braces matched; None without one, or where it never closes.

    >>> last_boxed(r"so \boxed{1} and \boxed{\frac{1}{2}}.")
    '\\frac{1}{2}'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for at in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[begin:at]
    return None


def _number(text: str, *, first: bool) -> Fraction | None:
    """The first or the last number of a piece of text."""
    found = NUMBER.findall(text)
    for one in found if first else reversed(found):
        plain = re.sub(r"[$,\s]", "", one)
        above, _, below = plain.partition("/")
        if len(plain) > LONGEST_NUMBER or (below and not int(below)):
            continue
        return Fraction(above) / (int(below) if below else 1)
    return None
