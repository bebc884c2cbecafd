"""Results of other verbs beside a run: evaluations, drafts, gates on the same rows, dynamics, landscape, texts.

Each kind is known by the keys its verb writes; what has other keys is named and left out.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

from selectkd.report.charts import Chart, Line, number, tick
from selectkd.report.escapes import shortened

LONGEST_TEXT, LONGEST_DIFF, MOST_TEXTS, MOST_ROWS = 4000, 2000, 12, 60


@dataclass
class Results:
    """What was found: rows ready for the page. unknown: files that no verb of ours wrote."""

    evaluations: list[dict[str, str]] = field(default_factory=list)
    differences: list[dict[str, str]] = field(default_factory=list)
    texts: list[dict[str, Any]] = field(default_factory=list)
    tables: list[dict[str, Any]] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    matrices: list[dict[str, Any]] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    unknown: list[str] = field(default_factory=list)


def read_results(named: Iterable[tuple[str, Any]]) -> Results:
    """The results among (file name, content); a file whose content is not as its verb writes it is unknown."""
    found = Results()
    for name, content in named:
        kind = _kind(content)
        if kind is None:
            found.unknown.append(name)
            continue
        try:
            _READERS[kind](found, content)
            found.kinds.add(kind)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            found.unknown.append(f"{name} ({type(error).__name__}: {shortened(error, 80)})")
    return found


def _kind(content: Any) -> str | None:
    keys = set(content) if isinstance(content, dict) else set()
    if isinstance(content, list) and content and isinstance(content[0], dict) and "selection" in content[0]:
        return "compare"
    for kind, needed in (
        ("texts", {"texts"}), ("eval", {"rows", "comparisons"}), ("speculate", {"rows", "acceptance_by_position"}),
        ("panel", {"gates", "jaccard"}), ("dynamics", {"kappa", "theorem_1"}), ("landscape", {"students", "settings"}),
    ):  # fmt: skip
        if needed <= keys:
            return kind
    return None


def _eval(found: Results, content: Any) -> None:
    for row in content["rows"][:MOST_ROWS]:
        ends = f"[{number(row['low'])}, {number(row['high'])}]"
        found.evaluations.append(
            {key: shortened(row[key], 80) for key in ("model", "task", "metric")}
            | {"value": number(row["value"]), "interval": ends, "n": number(row["n"])}
        )
    for row in content["comparisons"][:MOST_ROWS]:
        found.differences.append(
            {
                "task": shortened(row["task"], 80),
                "pair": shortened(f"{row['second']} minus {row['first']}", 160),
                "value": f"{row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]",
                "p": number(row["p_bootstrap"]),
            }
        )


def _texts(found: Results, content: Any) -> None:
    for one in content["texts"][:MOST_TEXTS]:
        teacher = shortened(one.get("teacher") or "", LONGEST_TEXT)
        students = [
            (name, marked(shortened(one[key], LONGEST_TEXT), teacher))
            for name, key in (("student before", "before"), ("student after", "after"))
            if one.get(key) is not None
        ]
        found.texts.append(
            {"prompt": shortened(one["prompt"], LONGEST_TEXT), "teacher": teacher, "students": students}
        )


def marked(text: str, beside: str) -> Markup:
    """``text`` escaped, with words that ``beside`` has not, in order, in <mark>; of a long one the beginning alone."""
    words, others = _words(text[:LONGEST_DIFF]), _words(beside[:LONGEST_DIFF])
    matcher = difflib.SequenceMatcher(None, others, words, autojunk=False)
    parts = []
    for kind, _, _, begin, end in matcher.get_opcodes():
        piece = escape("".join(words[begin:end]))
        if piece:
            parts.append(piece if kind == "equal" else Markup("<mark>{}</mark>").format(piece))
    return Markup("").join([*parts, escape(text[LONGEST_DIFF:])])


def _words(text: str) -> list[str]:
    """Words and the space between them, nothing lost."""
    out: list[str] = []
    for letter in text:
        if out and letter.isspace() == out[-1][-1].isspace():
            out[-1] += letter
        else:
            out.append(letter)
    return out


def _speculate(found: Results, content: Any) -> None:
    rows = [row for row in content["rows"] if row.get("acceptance_by_position")]
    lines = [
        Line(
            shortened(f"{row['draft']}, T {row['temperature']:g}, length {row.get('draft_length', '?')}", 60),
            [(i + 1, value) for i, value in enumerate(row["acceptance_by_position"])],
            style, dots=True,
        )
        for style, row in enumerate(rows[:6])
    ]  # fmt: skip
    found.charts.append(
        Chart(
            "Draft tokens accepted by position", "share", lines, x="position in the draft", low=0.0, high=1.0
        )
    )
    found.tables.append(
        {
            "title": "The student as a draft (speculative decoding)",
            "head": ["draft", "temperature", "draft length", "accepted", "tokens a pass", "speed-up"],
            "rows": [
                [
                    shortened(row["draft"], 60), tick(row["temperature"]), number(row.get("draft_length")),
                    number(row.get("acceptance")), number(row.get("mean_accepted_length")),
                    number(row.get("speedup_measured")),
                ]
                for row in content["rows"][:MOST_ROWS]
            ],
        }
    )  # fmt: skip


def _panel(found: Results, content: Any) -> None:
    names = list(content["gates"])
    cells = [
        [1.0 if one == other else content["jaccard"].get(one, {}).get(other) for other in names]
        for one in names
    ]
    found.matrices.append(
        {
            "title": "Overlap of gates on the same rows",
            "note": f"Jaccard index of the rows kept, {number(content['n'])} rows: 1 is the same rows.",
            "names": [shortened(name, 40) for name in names],
            "cells": [
                [("-", 0) if v is None else (f"{v:.2f}", round(9 * min(max(v, 0.0), 1.0))) for v in row]
                for row in cells
            ],
        }
    )
    found.tables.append(
        {
            "title": "Gates on the same rows",
            "head": ["gate", "rate kept", "loss removed", "gradient removed"],
            "rows": [
                [
                    shortened(name, 40),
                    *(number(one[key]) for key in ("rate", "loss_removed", "gradient_removed")),
                ]
                for name, one in content["gates"].items()
            ],
        }
    )


def _dynamics(found: Results, content: Any) -> None:
    shown = {
        "kappa": f"{number(content['kappa'])} [{number(content['kappa_low'])}, {number(content['kappa_high'])}]",
        "TAR did not fall between measurements": number(content["nondecreasing_share"]),
        "Theorem 1 holds between measurements": number(content.get("theorem_1_share")),
        "flips": number(content["flips"]),
    }
    found.tables.append(
        {
            "title": "Dynamics of acceptance",
            "head": ["measure", "value"],
            "rows": list(map(list, shown.items())),
        }
    )


def _landscape(found: Results, content: Any) -> None:
    lines = []
    for style, one in enumerate(content["students"]):
        points = [(x, y) for x, y in zip(one["at"], one["line"], strict=True)]
        lines.append(Line(shortened(one["student"], 60), points, style))
    found.charts.append(Chart("Loss along a line through the weights", "nats", lines, x="relative distance"))
    found.tables.append(
        {
            "title": "Flatness", "head": ["student", "loss", "top eigenvalue", "sharpness"],
            "rows": [
                [
                    shortened(one["student"], 60), number(one["loss"]), number(one.get("top_eigenvalue")),
                    number((one.get("sharpness") or {}).get("value")),
                ]
                for one in content["students"]
            ],
        }
    )  # fmt: skip


def _compare(found: Results, content: Any) -> None:
    found.tables.append(
        {
            "title": "Comparison with controls", "words": 3,
            "head": ["recipe", "method", "selection", "seed", "held-out KL", "TAR"],
            "rows": [
                [
                    *(shortened(row.get(key, ""), 40) for key in ("recipe", "method", "selection", "seed")),
                    number(row.get("held_out_kl")), number(row.get("tar")),
                ]
                for row in content[:MOST_ROWS]
            ],
        }
    )  # fmt: skip


_READERS: dict[str, Callable[[Results, Any], None]] = {
    "eval": _eval,
    "texts": _texts,
    "speculate": _speculate,
    "panel": _panel,
    "dynamics": _dynamics,
    "landscape": _landscape,
    "compare": _compare,
}
