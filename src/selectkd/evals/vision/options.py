"""Which option of a multiple-choice question an answer names; None where no single one can be read.

Read in this order: a letter alone, the text of an option alone, a statement ("the answer is B"), a letter that begins
the answer, the one letter it names, the one option whose text it holds. A letter or text that the answer denies does
not count. Nothing is drawn at random and no option is the nearest: docs/vision_evaluation.md has the rules beside
VLMEvalKit's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

from selectkd.evals.judging.question import without_thinking
from selectkd.evals.numbers import last_boxed

LATEX = (
    (r"\\d?t?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mathbb|mbox|boldsymbol)\s*\{([^{}]*)\}", r"\1"),
    (r"\^\s*\{?\\circ\}?|\\degree", "°"),
    (r"\\%", "%"),
    (r"\\[()\[\],;:! ]|\$", " "),
)
MARKS = re.compile(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)")
"""Emphasis and code of Markdown."""
OPENED, CLOSED = r"[\s(\[{<\"'\u201c\u2018]*", r"[\s)\]}>\"'\u201d\u2019.:,;!。]*"
STATEMENT = (
    r"(?P<subject>(?:\b(?P<kind>\w+)\s+)?\banswer\b|\b(?:correct|right|best|final)\s+(?:option|choice|letter)\b|"
    r"\bI\s+(?:would\s+|will\s+)?(?:choose|pick|select|go\s+with)\b|答案|选择|选)"
    r"(?P<link>\s*(?:to\s+(?:the|this)\s+question\s*)?(?:\bis\b|\b(?:should|must|would|will)\s+be\b|[:=]|->|→|是|为|应为)?)\s*:?\s*"
    r"(?:(?:most\s+likely|probably|clearly|therefore|thus|indeed)\s+)?(?:(?:option|choice|letter)\s+)?"
)
"""What stands before a stated answer."""
WRONG_KINDS = frozenset({"wrong", "incorrect", "false", "bad", "no"})
GOES_ON = frozenset(
    {"because", "since", "as", "is", "and", "or", "not", "but", "due", "based", "which", "given", "for", "so"}
)
"""Words that go on after a letter; before any other, ``A`` is an article and ``I`` a pronoun."""
DENIED_BEFORE = (
    r"(?:\b(?:not|never|neither|nor|except|eliminat\w+|exclud\w+|reject\w*|unlike|instead\s+of|rather\s+than|"
    r"other\s+than|rul\w+\s+out|cannot\s+be|nothing\s+but|(?:wrong|incorrect|false)\s+(?:answer|option|choice)\s+is)|n't)\s+(?:(?:be|options?|choices?|the|an?|any|in|on|at|of|to|"
    r"really|actually|necessarily|both|either|answer|is)\s+){0,3}[\"'(]*"
)
DENIED_AFTER = (
    r"[\"')]*\s*(?:(?:is|are|was|were|can|could|would|does|do|must|seems?|looks?)(?:n't|\s+not)|cannot|can't|"
    r"(?:(?:is|are|was|were|seems?|looks?|must\s+be|would\s+be)\s+)(?:\w+ly\s+|both\s+|all\s+)?(?:wrong|incorrect|false|"
    r"impossible|excluded|eliminated|ruled\s+out|out\b|absent|missing))"
)
HEDGED = re.compile(
    r"\bsorry\b|\bunable\s+to\b|\b(?:un)?(?:sure|certain)\b|\bunclear\b|\b(?:don't|do\s+not)\s+know\b|\bimpossible\s+to\b|"
    r"\b(?:cannot|can't|could\s+not|couldn't|can\s+not)\s+(?:be\s+)?(?:\w+ly\s+)?(?:tell|told|determined?|say|said|see|"
    r"identif\w+|answer\w*|decided?|provide|help|assist|make|made|judged?|know|known)\b|\beither\b|\b(?:maybe|perhaps)\b",
    re.IGNORECASE,
)
"""An answer that does not answer: an option's text in it is a mention."""
TAKEN_BACK = re.compile(r"\b(?:wait|actually|no|correction|hmm|on\s+second\s+thought)\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<=[^\s.][.!?])\s+(?=\S)|\n+|。")


def chosen_option(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the option that ``answer`` names; None where it names none or several.

    options: letter -> text. Markdown, LaTeX and full-width letters do not matter, and thinking before the answer is
    left out.

    >>> chosen_option("Answer: (B) because A is wrong", {"A": "cat", "B": "dog"})
    'B'
    >>> chosen_option("A dog, not a cat.", {"A": "cat", "B": "dog"}), chosen_option("A or B", {"A": "cat", "B": "dog"})
    ('B', None)
    """
    boxed = last_boxed(answer)
    if boxed is not None and (found := _alone(legible(boxed), options)) is not None:
        return found
    text = legible(without_thinking(answer))
    if (found := _alone(text, options)) is not None:
        return found
    stated, found = _stated(text, options)
    if stated:
        return found
    begins, found = _leading(text, options)
    if begins:
        return found
    letters = _letters(_masked(text, options), options)
    if len(letters) > 1:
        return None
    of_text = _contained(text, options)
    if letters:
        return letters.pop() if of_text is None or of_text in letters else None
    return of_text


def legible(text: str) -> str:
    r"""A text without Markdown's and LaTeX's marks, its full-width characters as plain ones.

    >>> legible("**\uff22** is " + r"$\frac{3}{4}$")
    'B is  3/4'
    """
    text = (
        unicodedata.normalize("NFKC", text)
        .replace("\u2044", "/")
        .replace("\u2019", "'")
        .replace("\u2212", "-")
    )
    for pattern, meant in LATEX:
        text = re.sub(pattern, meant, text)
    return MARKS.sub("", text).strip()


def folded(text: str) -> str:
    """A text as options are compared: small letters, one space, no thousands separators, no punctuation around it."""
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", legible(text).casefold())
    return re.sub(r"\s+", " ", text).strip(" .,;:!。\"'\u201c\u201d()[]")


def _alone(text: str, options: Mapping[str, str]) -> str | None:
    """The option whose letter or text the whole answer is."""
    whole = re.fullmatch(
        rf"{OPENED}(?:(?:option|choice|answer)\s+)?{OPENED}([A-Za-z]){CLOSED}", text, re.IGNORECASE
    )
    if whole is not None and whole[1].upper() in options:
        return whole[1].upper()
    same = [letter for letter, of in options.items() if folded(of) == folded(text)]
    return same[0] if len(same) == 1 else None


def _stated(text: str, options: Mapping[str, str]) -> tuple[bool, str | None]:
    """(whether the answer states which option is right, which one); the last statement counts."""
    pattern = re.compile(
        rf"{STATEMENT}(?P<open>[\"'(\[]*)(?P<letter>[{_class(options)}])(?![\w'])(?P<close>[\"')\]]*)",
        re.IGNORECASE,
    )
    last: tuple[int, str | None] | None = None
    for found in pattern.finditer(text):
        if (found["kind"] or "").lower() in WRONG_KINDS or _is_word(found, text):
            continue
        letter = found["letter"].upper()
        last = found.end(), None if _has_alternative(text[found.end() :], options) else letter
    verdict = re.compile(
        rf"(?:\b(?:option|choice)\s+|(?<![\w'.-]))\(?(?P<letter>[{_class(options)}])\)?\s+(?:is|seems|must\s+be|would\s+be)\s+"
        r"(?:the\s+|clearly\s+|obviously\s+|definitely\s+|most\s+likely\s+|probably\s+)*(?:correct|right|best|true|answer)\b"
    )
    for found in verdict.finditer(text):
        shared = re.search(r"(?:\band|\bor|\bnor|[,/&])\s*(?:option\s+)?\(?$", text[: found.start("letter")])
        if last is None or found.end() > last[0]:
            last = found.end(), None if shared else found["letter"]
    if last is None:
        return _stated_text(text, options)
    end, letter = last
    back = TAKEN_BACK.search(text, end)
    if back is not None and _letters(text[back.end() :], options) - {letter}:
        letter = None
    return True, letter


def _stated_text(text: str, options: Mapping[str, str]) -> tuple[bool, str | None]:
    """The option whose text stands behind the last "the answer is"; not stated where no option's does."""
    for found in reversed(list(re.finditer(STATEMENT, text, re.IGNORECASE))):
        if not found["link"].strip() or (found["kind"] or "").lower() in WRONG_KINDS:
            continue
        sentence = SENTENCE_END.split(text[found.end() :].strip(), maxsplit=1)[0]
        letter = _alone(sentence, options) or _contained(sentence, options)
        return letter is not None, letter
    return False, None


def _leading(text: str, options: Mapping[str, str]) -> tuple[bool, str | None]:
    """(whether the answer begins with a letter set off from what follows, the letter)."""
    dash = "[-\u2013\u2014]+"
    mark = rf"(?:\((?P<a>[{_class(options)}])\)|(?P<b>[{_class(options)}])(?:\)|[.:](?=\s)|,\s|\s+{dash}\s|\s*\n))"
    found = re.match(rf"[\s\"'\u201c-]*(?:option\s+)?{mark}", text, re.IGNORECASE)
    if found is None:
        # a capital letter that a reason follows: "B because ..."
        found = re.match(
            rf"(?:option\s+)?(?P<a>[{_class(options)}])(?P<b>)\s+(?:because|since|as|due)\b", text
        )
        if found is None:
            return False, None
    letter, rest = (found["a"] or found["b"]).upper(), text[found.end() :]
    if _has_alternative(text[found.end("a" if found["a"] else "b") :], options):
        return True, None
    listed = {
        (one["a"] or one["b"]).upper()
        for one in re.finditer(
            rf"(?<![\w'])(?:\((?P<a>[{_class(options)}])\)|(?P<b>[{_class(options)}])[).:](?=\s))", rest
        )
        if not _denied(rest, one.start(), one.end())
    }
    named = [other for other, of in options.items() if folded(of) == folded(rest)]
    if listed - {letter} or (named and letter not in named):
        return True, None
    return True, letter


def _letters(text: str, options: Mapping[str, str]) -> set[str]:
    """The letters a text names and does not deny. A small letter counts in parentheses alone."""
    one = rf"(?:\([{_class(options)}{_class(options).lower()}]\)|(?<![\w'.-])[{_class(options)}](?![\w'-]))"
    group = re.compile(rf"{one}(?:\s*(?:,\s*(?:and|or)?|/|&|\band\b|\bor\b|\bnor\b)\s*(?:option\s+)?{one})*")
    named: set[str] = set()
    for found in group.finditer(text):
        if _denied(text, found.start(), found.end()):
            continue
        letters = {letter.upper() for letter in re.findall(r"[A-Za-z](?!\w)(?<!\w\w)", found[0])} & set(
            options
        )
        after = re.match(r"\s+(\w+)", text[found.end() :])
        if found[0] in ("A", "I") and after is not None and after[1].lower() not in GOES_ON:
            continue
        named |= letters
    return named


def _contained(text: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text stands in an answer of one sentence, not denied; of "dark red" and "red" the longer."""
    low = folded(text)
    if HEDGED.search(low) or len(SENTENCE_END.split(low)) > 1:
        return None
    named: list[str] = []
    for letter, of in sorted(options.items(), key=lambda item: -len(folded(item[1]))):
        wanted = folded(of)
        places = list(_places(wanted, low)) if wanted else []
        if any(not _denied(low, start, stop) for start, stop in places):
            named.append(letter)
        for start, stop in places:
            low = low[:start] + "_" * (stop - start) + low[stop:]
    return named[0] if len(named) == 1 else None


def _masked(text: str, options: Mapping[str, str]) -> str:
    """A text without the texts of the options, whose own letters are no choice (vitamin C)."""
    low = text.casefold()
    if len(low) != len(text):
        return text
    for of in sorted(map(legible, options.values()), key=len, reverse=True):
        for start, stop in list(_places(of.casefold(), low)) if len(of) > 1 else []:
            low = low[:start] + "_" * (stop - start) + low[stop:]
    return "".join("_" if kept == "_" else one for one, kept in zip(text, low, strict=True))


def _places(wanted: str, text: str) -> list[tuple[int, int]]:
    """Where a text stands as whole words and whole numbers."""
    pattern = rf"(?<![\w])(?<!\d[.,/])(?<![-/.]){re.escape(wanted)}(?!\w|[.,/]\d|'\w)"
    return [found.span() for found in re.finditer(pattern, text)]


def _denied(text: str, start: int, stop: int) -> bool:
    """Whether a text denies what stands at [start, stop)."""
    before = re.search(rf"{DENIED_BEFORE}$", text[:start], re.IGNORECASE)
    bare_no = re.search(r"\bno\s+$", text[:start], re.IGNORECASE)
    return bool(before or bare_no or re.match(DENIED_AFTER, text[stop:], re.IGNORECASE))


def _has_alternative(rest: str, options: Mapping[str, str]) -> bool:
    """Whether another letter is offered beside the one that ends before ``rest``: "or C", "and C."."""
    other = rf"(?:option\s+)?\(?[{_class(options)}](?![\w'])\)?"
    ends = r"\s*(?:$|[.,;!\n]|and\b|or\b)"
    offered = rf"[\s)\]\"']*(?:(?:,?\s*\bor\b|/)\s*{other}|(?:,\s*(?:and\b)?|&|\band\b)\s*{other}{ends})"
    return re.match(offered, rest) is not None


def _is_word(found: re.Match[str], text: str) -> bool:
    """Whether the letter of a statement is an article or a pronoun, or begins a word of its own."""
    after = re.match(r"\s+(\w+)", text[found.end() :])
    if not found["link"].strip() and not re.search(r"I\s|选", found["subject"]) and not found["open"]:
        return not found["letter"].isupper() or after is not None
    if found["open"] and found["close"]:
        return False
    letter = found["letter"]
    if letter.isupper() and letter not in "AI":
        return False
    return after is not None and (letter.islower() or after[1].lower() not in GOES_ON)


def _class(options: Mapping[str, str]) -> str:
    return "".join(options)
