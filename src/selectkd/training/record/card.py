"""The model card of a student. Everything that came from outside is quoted by the YAML writer or escaped."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from selectkd import __version__

WORD = re.compile(r"[A-Za-z][A-Za-z_/-]*", re.ASCII)
NO_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")
"""Words that some version of YAML reads as something else than text."""

_MEASURES = (
    ("kl", "KL(teacher to student), nats a token"),
    ("perplexity", "perplexity of the text"),
    ("tar", "TAR (mean share of accepted tokens)"),
    ("bite", "bite (share of the divergence removed)"),
)


def model_card(
    *,
    teacher: str,
    student: str,
    data: Sequence[str],
    method: Mapping[str, Any],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    steps: int,
    tokens: int,
) -> str:
    """The README.md of a student: YAML front matter, method, data, teacher, and held-out numbers before and
    after.
    """
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "selectkd"],
        "selectkd": {
            "teacher": teacher,
            "student": student,
            "data": list(data),
            "method": {key: value for key, value in method.items()},
            "tar": {"before": before.get("tar"), "after": after.get("tar")},
        },
    }
    lines = [
        "---",
        _yaml(front).rstrip(),
        "---",
        "",
        "# A student distilled with selectkd",
        "",
        f"Teacher: {plain(teacher)}. Student it started from: {plain(student)}.",
        f"Data: {', '.join(plain(name) for name in data)}.",
        f"Trained for {steps} steps on {tokens} supervised tokens with selectkd {__version__}.",
        "",
        "## Method",
        "",
        "The student proposes a token at each position, the teacher verifies it; accepted positions get",
        "the full divergence, rejected ones the weight beta (SelecTKD, arXiv 2510.24021).",
        "",
        *[f"- {plain(str(key))}: {plain(str(value))}" for key, value in method.items()],
        "",
        "## Measured on held-out text",
        "",
        "| | before | after |",
        "|---|---|---|",
        *_rows(before, after),
        "",
        "TAR depends on the verifier and its k; compare it only at the same ones.",
        "",
    ]
    return "\n".join(lines)


def _rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The rows of the table of held-out measures."""
    rows = [
        f"| {label} | {_number(before.get(name))} | {_number(after.get(name))} |"
        for name, label in _MEASURES
        if name in before or name in after
    ]
    if after.get("teacher_perplexity") is not None:
        rows.append(f"| perplexity of the teacher | {_number(after['teacher_perplexity'])} | the same |")
    return rows


def plain(text: str) -> str:
    """Text as one line of Markdown that shows itself: no control characters, no markup."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    for mark in "\\`*_[]<>|#":
        kept = kept.replace(mark, "\\" + mark)
    return kept


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "not measured"


class _Plainly(SafeRepresenter):
    """Writes what YAML 1.1 and 1.2 read alike: strings in quotes (``no``, ``1:30``), floats with a point."""

    def represent_str(self, data: Any) -> Any:
        plain = WORD.fullmatch(data) and data.lower() not in NO_WORDS
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')

    def represent_float(self, data: Any) -> Any:
        if not math.isfinite(data):
            return super().represent_float(data)
        text = repr(data)
        return self.represent_scalar(
            "tag:yaml.org,2002:float", text if "." in text else text.replace("e", ".0e")
        )


_Plainly.add_representer(str, _Plainly.represent_str)
_Plainly.add_representer(float, _Plainly.represent_float)


def _yaml(value: Any) -> str:
    writer = YAML(typ="safe", pure=True)
    writer.Representer = _Plainly
    writer.default_flow_style = False
    out = io.StringIO()
    writer.dump(_plain_data(value), out)
    return out.getvalue()


def _plain_data(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain_data(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(each) for each in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)
