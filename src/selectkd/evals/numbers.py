"""The number an answer ends on, read as a person would: thousands, fractions, mixed numbers, powers of ten, units."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

LONGEST_NUMBER = 300
"""Characters: more digits are no answer, and Python refuses to read a few thousand."""
LARGEST_POWER = 300
MARKED = re.compile(r"####[ \t]*(?![^\S\n]*\d+\.[ \t]+\S)(?=[-*$£€\\(\[ \t]*[\d.])")
"""GSM8K's mark before a number; a heading of Markdown, ``#### 3. Add them`` or ``#### Step 3``, is none."""
ANSWER_PHRASE = re.compile(r"(?:final answer|answer)(?:\s+is|\s*[:=])\s*:?\s*", re.IGNORECASE)
SENTENCE_END = re.compile(r"\n|[.!?;](?:\s|$)")
REASON = re.compile(r",\s|\(|\b(?:because|since|where|when|if|as|for|with)\b", re.IGNORECASE)
"""Where a sentence goes on from its answer to something else."""
NUMBER = re.compile(
    r"""
    (?<![\w.^/])                                                    # no part of a word, a power or a fraction
    (?P<sign>(?<!\d\s)-\s?)? (?:[$£€]\s?)? (?P<late>-)?
    (?: (?P<whole>\d+)\s+(?P<part>\d+\s?/\s?\d+)                     # 1 1/2
      | (?P<plain>\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
        (?: \s?/\s?(?P<below>\d+) | \s?\^\s?\{?(?P<power>-?\d+)\}? | [eE](?P<e>[-+]?\d+)
          | \s?[*x]\s?10\s?\^\s?\{?(?P<ten>-?\d+)\}? )?
    )
    """,
    re.VERBOSE | re.ASCII,
)
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
LATEX = (
    (r"\\d?t?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "),
    (r"\\d?t?frac\s*(\d)\s*(\d)", r" \1/\2 "),
    (r"\{,\}|(?<=\d)\\[,!;:](?=\d{3}(?!\d))", ","),
    (r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))", ","),
    (r"\\[,!;: ]|~|\\(?:left|right|quad)\b", " "),
    (r"\\(?:times|cdot|ast)\b|[\u00d7\u00b7]", "*"),
    (r"\\(?:text|mathrm|mathbf|textbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    (r"\\([$%])", r"\1"),
    (r"_\{?\w+\}?", " "),
    (r"(?<=[A-Za-z°])\s*\}?\s?\^\s?\{?-?\d+\}?", " "),  # square metres; x squared
)
"""What stands for the same in plain text; the order counts."""


def final_number(text: str) -> Fraction | None:
    r"""The number a text ends on, as GSM8K's answers are read: after the last ``####`` that a number follows, in the
    last \boxed{}, after the last "answer is", else the last number of all; None where there is none.

    Thousands (1,200 and 1{,}200), a currency, a percent sign, units and their powers do not matter; 1/2, 0.5 and
    \frac{1}{2} are the same number, and so are 3 1/2 and 3.5, 2 \times 10^{3} and 2000. Of an equation the side counts
    that is one number: ``3 * 4 = 12`` is 12.

    >>> final_number("She pays 3 x $400. #### $1,200."), final_number("2, so the answer is -1/2"), final_number("no")
    (Fraction(1200, 1), Fraction(-1, 2), None)
    >>> final_number("The answer is 3 * 4 = 12."), final_number(r"\boxed{1{,}200\text{ m}^2}")
    (Fraction(12, 1), Fraction(1200, 1))
    """
    marked = list(MARKED.finditer(text))
    if marked:
        return _of_equation(plain(text[marked[-1].end() :].split("\n", 1)[0]), first=True)
    boxed = last_boxed(text)
    if boxed is not None:
        return _of_equation(plain(boxed), first=False)
    phrases = list(ANSWER_PHRASE.finditer(text))
    if phrases:
        sentence = SENTENCE_END.split(text[phrases[-1].end() :], maxsplit=1)[0]
        if (found := _of_equation(plain(sentence), first=True)) is not None:
            return found
    numbers = numbers_of(text)
    return numbers[-1] if numbers else None


def numbers_of(text: str) -> list[Fraction]:
    """Every number of a text, in order.

    >>> numbers_of("1,200 of 3 1/2")
    [Fraction(1200, 1), Fraction(7, 2)]
    """
    return _numbers(plain(text))


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


def plain(text: str) -> str:
    r"""LaTeX and typography of numbers as plain text.

    >>> plain("2½ m²"), plain(r"\dfrac12"), plain(r"1\,200"), plain("3 \\times 10⁵")
    ('2 1/2  m ', ' 1/2 ', '1,200', '3 * 10^5')
    """
    text = re.sub("[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda found: "^" + found[0].translate(SUPERSCRIPTS), text)
    text = re.sub(
        "[¼½¾⅐-⅞]",
        lambda found: " " + unicodedata.normalize("NFKC", found[0]).replace("\u2044", "/") + " ",
        text,
    )
    text = text.replace("\u2212", "-")
    for pattern, meant in LATEX:
        text = re.sub(pattern, meant, text)
    return unicodedata.normalize("NFKC", text) if not text.isascii() else text


def _of_equation(text: str, *, first: bool) -> Fraction | None:
    """The number of the last side of an equation that is one number, else the first or the last number."""
    sides = [_numbers(side) for side in REASON.split(text, maxsplit=1)[0].split("=")]
    alone = [side[0] for side in sides if len(side) == 1]
    if len(sides) > 1 and alone:
        return alone[-1]
    numbers = _numbers(text)
    return (numbers[0] if first else numbers[-1]) if numbers else None


def _numbers(text: str) -> list[Fraction]:
    """Every number of a plain text, in order."""
    return [value for found in NUMBER.finditer(text) if (value := _value(found)) is not None]


def _value(found: re.Match[str]) -> Fraction | None:
    """What a number is worth; None for what is none, or too long."""
    sign = -1 if found["sign"] or found["late"] else 1
    powers = [int(found[name]) for name in ("power", "e", "ten") if found[name]]
    if len(found[0]) > LONGEST_NUMBER or any(abs(one) > LARGEST_POWER for one in powers):
        return None
    if found["whole"]:
        above, below = (int(one) for one in found["part"].split("/"))
        return sign * (int(found["whole"]) + Fraction(above, below)) if below else None
    value = Fraction(found["plain"].replace(",", ""))
    if found["below"]:
        return sign * value / int(found["below"]) if int(found["below"]) else None
    if found["power"]:
        return sign * value ** int(found["power"]) if value else None
    exponent = powers[0] if powers else 0
    return sign * value * Fraction(10) ** exponent
