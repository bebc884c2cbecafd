"""The token heat-map: texts with each token coloured by its verdict, and its numbers packed for the page's script.

A token is an ``<i>`` whose class says the verdict and, in six levels, the divergence. The numbers of a look are columns
in half precision, which keeps three digits, and compressed: a page of 100,000 tokens has to stay small.
"""

from __future__ import annotations

import base64
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from selectkd.report.escapes import clean, shortened
from selectkd.report.looks import Look, Looks

LEVELS = (0.02, 0.1, 0.3, 1.0, 3.0)
"""Nats of divergence where a stronger colour begins."""
FLOATS = (
    "p_proposal", "q_proposal", "p_teacher_top", "teacher_entropy", "student_entropy", "weight", "share", "divergence",
)  # fmt: skip
"""Columns in half precision, in the order of the page's script."""
LONGEST_TOKEN, LONGEST_PROMPT = 400, 1200
BYTES, TOKEN_BYTES, MARK_BYTES, NUMBER_BYTES = 4_000_000, 19, 0.8, 20
"""What texts and measurements may take of a page; a token's HTML, and its verdict and numbers in a measurement: those
are of random numbers, which compress worst."""
UNVERIFIED, REJECTED, ACCEPTED = 0, 1, 2
EFFORT = 4
"""Of gzip, from 1 to 9: beyond it the columns of 100,000 tokens take seconds more and 1% less room."""


@dataclass(frozen=True)
class Shown:
    """A look on the page: which run it is of, the look, and the verdicts of the look before it, for flips."""

    run: str
    look: Look
    before: NDArray[Any] | None

    @cached_property
    def verdict(self) -> NDArray[np.int64]:
        """UNVERIFIED, REJECTED or ACCEPTED for each token."""
        return np.where(self.look.unverified, UNVERIFIED, np.where(self.look.accepted, ACCEPTED, REJECTED))

    @property
    def level(self) -> NDArray[np.int64]:
        """0 to 5 by the divergence; what is not finite counts as the strongest."""
        return np.digitize(np.nan_to_num(self.look["divergence"], nan=np.inf), LEVELS)

    @cached_property
    def flip(self) -> NDArray[np.int64]:
        """1 where a token was accepted since the look before, -1 where it was lost."""
        accepted = self.look.accepted
        if self.before is None:
            return np.zeros(len(accepted), np.int64)
        return accepted.astype(np.int64) - self.before.astype(np.int64)


def shown(runs: Sequence[tuple[str, Looks]]) -> list[Shown]:
    """The looks of the first run and of those after it that looked at the same texts.

    Where there are too many for a page, the first, the last and some evenly between; flips are between those.
    """
    found = []
    for name, looks in runs:
        before = None
        for at in _evenly(len(looks.looks), int(BYTES / 4 / MARK_BYTES / max(looks.tokens, 1) / len(runs))):
            one = looks.looks[at]
            found.append(Shown(name, one, before))
            before = one.accepted
    return found


def _evenly(n: int, most: int) -> list[int]:
    """At most ``most`` of 0 to n - 1, and both ends.

    >>> _evenly(3, 5), _evenly(9, 3), _evenly(9, 0)
    ([0, 1, 2], [0, 4, 8], [0, 8])
    """
    if n <= most:
        return list(range(n))
    most = max(most, 2)
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def with_numbers(every: Sequence[Shown], visible: int) -> set[int]:
    """The looks whose tokens have numbers beside their verdicts: all, where BYTES allow it.

    The visible one always; then the first, the last of each run, and some evenly between.
    """
    n = max(len(every[visible].look["sample"]), 1)
    most = int((BYTES - n * (TOKEN_BYTES + MARK_BYTES * len(every))) / n / NUMBER_BYTES)
    last = [i for i, one in enumerate(every) if i + 1 == len(every) or every[i + 1].run != one.run]
    wanted = dict.fromkeys([visible, 0, *last, *_evenly(len(every), most)])
    return set(list(wanted)[: max(most, 1)])


def texts_of(looks: Looks, one: Shown) -> list[dict[str, Any]]:
    """Of each probe text its stream, counts and tokens as HTML, as ``one`` has them."""
    sample, token = one.look["sample"], one.look["token"]
    classes = [_class(*values) for values in zip(one.verdict, one.level, one.flip, strict=True)]
    first = np.r_[0, np.flatnonzero(np.diff(sample)) + 1, len(sample)] if len(sample) else np.array([0])
    found = []
    for begin, end in zip(first[:-1].tolist(), first[1:].tolist(), strict=True):
        text = looks.texts[int(sample[begin])]
        accepted = int((one.verdict[begin:end] == ACCEPTED).sum())
        found.append(
            {
                "stream": text.stream, "begin": begin, "tokens": end - begin, "accepted": accepted,
                "rejected": int((one.verdict[begin:end] == REJECTED).sum()),
                "html": _html(text.tokens, token[begin:end].tolist(), classes[begin:end]),
            }
        )  # fmt: skip
    return found


def _class(verdict: int, level: int, flip: int) -> str:
    kind = "" if verdict == ACCEPTED and not level else f"{'nra'[verdict]}{level}"
    return (kind + ("" if not flip else " w" if flip > 0 else " l")).strip()


def _html(tokens: Sequence[str], at: Sequence[int], classes: Sequence[str]) -> Markup:
    """All tokens of a text; those without a verdict, the prompt above all, are grey."""
    of_token = dict(zip(at, classes, strict=True))
    parts: list[str] = []
    masked: list[str] = []
    for number, token in enumerate(tokens[: max(at, default=0) + 1]):
        if number not in of_token:
            masked.append(token)
            continue
        parts += _masked(masked)
        masked = []
        kind = of_token[number]
        inside = _token(token)
        quoted = f'"{kind}"' if " " in kind else kind
        parts.append(f"<i class={quoted}>{inside}</i>" if kind else f"<i>{inside}</i>")
    return Markup("".join(parts))


@lru_cache(maxsize=65536)
def _token(token: str) -> str:
    return _escaped(shortened(token, LONGEST_TOKEN, keep="\n\t"))


def _masked(tokens: Sequence[str]) -> list[str]:
    text = "".join(tokens)
    if not text:
        return []
    left = max(len(text) - LONGEST_PROMPT, 0)
    kept = (f"… {left:,} characters …\n" if left else "") + clean(text[left:], keep="\n\t")
    return [f"<s>{_escaped(kept)}</s>"]


def _escaped(text: str) -> str:
    """Escaped, a line's end shown by a sign before it."""
    return str(escape(text)).replace("\n", "<u></u>\n")


def packed(every: Sequence[Shown], visible: int) -> dict[str, Any]:
    """What the page's script needs: looks, and the pieces that proposals are named by. visible: the look shown."""
    names: dict[str, int] = {}
    numbers = with_numbers(every, visible)
    return {
        "columns": FLOATS,
        "looks": [
            _packed(one) | (_numbers(one, names) if i in numbers else {}) for i, one in enumerate(every)
        ],
        "pieces": list(names),  # filled by then
    }


def _packed(one: Shown) -> dict[str, Any]:
    look = one.look
    return {
        "run": one.run,
        "step": look.step,
        "n": len(look["sample"]),
        "tar": round(look.tar, 6),
        "won": int((one.flip > 0).sum()),
        "lost": int((one.flip < 0).sum()),
        "marks": _coded(one.verdict + 3 * one.level + 18 * (one.flip + 1), "<u1"),
    }


def _numbers(one: Shown, names: dict[str, int]) -> dict[str, Any]:
    look = one.look
    floats = np.stack([_half(look.columns.get(name), len(look["sample"])) for name in FLOATS])
    return {
        "rank": _coded(
            np.clip(look.columns.get("rank", np.full(len(look["sample"]), -1)), -1, 65534) % 65536, "<u2"
        ),
        "proposal": _coded(_named(look, "proposal", names), "<u4"),
        "teacher_top": _coded(_named(look, "teacher_top", names), "<u4"),
        "floats": _coded(floats.view(np.uint16), "<u2"),
    }


def _half(values: NDArray[Any] | None, n: int) -> NDArray[np.float16]:
    """Half precision; what is finite stays so."""
    if values is None:
        return np.full(n, np.nan, np.float16)
    bound = float(np.finfo(np.float16).max)
    return np.where(np.isfinite(values), np.clip(values, -bound, bound), np.nan).astype(np.float16)


def _named(look: Look, column: str, names: dict[str, int]) -> NDArray[np.int64]:
    """The number of each id's piece among ``names``, from 1; 0 is unknown."""
    ids = look.columns.get(column)
    if ids is None:
        return np.zeros(len(look["sample"]), np.int64)
    of_id = {}
    for one in np.unique(ids).tolist():
        piece = shortened(look.pieces[one], LONGEST_TOKEN, keep="") if one in look.pieces else None
        of_id[one] = 0 if piece is None else names.setdefault(piece, len(names)) + 1
    return np.array([of_id[one] for one in ids.tolist()], np.int64)


def _coded(values: NDArray[Any], kind: str) -> str:
    column = values.astype(kind)
    return base64.b64encode(gzip.compress(_planes(column, column.itemsize), EFFORT, mtime=0)).decode()


def _planes(values: NDArray[Any], size: int) -> bytes:
    """All first bytes, then all second ones: like bytes beside each other compress better."""
    return np.ascontiguousarray(values.reshape(-1)).view(np.uint8).reshape(-1, size).T.tobytes()
