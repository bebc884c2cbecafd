"""The model card of a student. Everything that came from outside is quoted by the YAML writer or escaped."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
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


@dataclass(frozen=True)
class Facts:
    """What a card says. before, after: held-out measures by name. base_model: the hub model that the student was made
    of; teacher_revision: a commit or a file's sha-256. data_hashes: fingerprints by name of the text. license: of the
    student, an identifier of the hub; license_note: where it comes from. recipe: YAML. files: what is uploaded beside
    the model, with a word on each.
    """

    teacher: str
    student: str
    data: Sequence[str]
    method: Mapping[str, Any]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    steps: int
    tokens: int
    name: str = "student"
    base_model: str | None = None
    teacher_revision: str | None = None
    data_hashes: Mapping[str, str] = field(default_factory=dict)
    license: str | None = None
    license_note: str | None = None
    recipe: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    evaluations: Sequence[Mapping[str, Any]] = ()


def model_card(facts: Facts) -> str:
    """The README.md of a student: YAML front matter, method, data, teacher, and held-out numbers before and after.

    The front matter is huggingface_hub's, with the numbers as its model-index.
    """
    teacher, student, data, method = facts.teacher, facts.student, facts.data, facts.method
    before, after, steps, tokens = facts.before, facts.after, facts.steps, facts.tokens
    front = _front(facts)
    lines = [
        "---",
        as_yaml(front).rstrip(),
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
        *_evaluated(facts.evaluations),
        *_provenance(facts),
    ]
    return "\n".join(lines)


def _front(facts: Facts) -> dict[str, Any]:
    """The front matter of a card, as huggingface_hub names its parts."""
    data = ModelCardData(
        base_model=facts.base_model,
        license=facts.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["distillation", "selectkd"],
        model_name=facts.name,
        eval_results=_results(facts) or None,
        selectkd={
            "teacher": facts.teacher,
            "student": facts.student,
            "data": list(facts.data),
            "method": {key: value for key, value in facts.method.items()},
            "tar": {"before": facts.before.get("tar"), "after": facts.after.get("tar")},
            **({"teacher_revision": facts.teacher_revision} if facts.teacher_revision else {}),
            **({"data_hashes": dict(facts.data_hashes)} if facts.data_hashes else {}),
        },
    )
    return data.to_dict()


def _results(facts: Facts) -> list[EvalResult]:
    """The held-out measures of the student and its evaluations as the hub's evaluation results; numbers alone."""
    found = [
        EvalResult(
            task_type="text-generation",
            dataset_type="heldout",
            dataset_name=f"held-out text of {', '.join(facts.data)}",
            metric_type=name,
            metric_name=label,
            metric_value=facts.after[name],
        )
        for name, label in _MEASURES
        if isinstance(facts.after.get(name), int | float) and math.isfinite(facts.after[name])
    ]
    return found + [
        EvalResult(
            task_type="text-generation",
            dataset_type=row["task"],
            dataset_name=row["task"],
            metric_type=row["metric"],
            metric_name=f"{row['metric']}, 95% [{_number(row['low'])}, {_number(row['high'])}], n {row['n']}",
            metric_value=row["value"],
        )
        for row in facts.evaluations
    ]


def _evaluated(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of evaluations; nothing without any."""
    if not rows:
        return []
    cells = [
        f"| {plain(row['task'])} | {plain(row['metric'])} | {_number(row['value'])} | [{_number(row['low'])}, "
        f"{_number(row['high'])}] | {row['n']} |"
        for row in rows
    ]
    return ["## Evaluated", "", "| task | metric | value | 95% | n |", "|---|---|---|---|---|", *cells, ""]


def _provenance(facts: Facts) -> list[str]:
    """The parts of a card that an upload adds: hashes, licence, files and the recipe."""
    lines: list[str] = []
    if facts.data_hashes or facts.teacher_revision:
        lines += ["## Made of", ""]
        lines += [f"- teacher: {plain(facts.teacher)}, {plain(str(facts.teacher_revision))}"] * bool(
            facts.teacher_revision
        )
        lines += [f"- {plain(name)}: {plain(value)}" for name, value in facts.data_hashes.items()]
        lines.append("")
    if facts.license_note:
        lines += ["## Licence", "", plain(facts.license_note), ""]
    if facts.files:
        lines += [
            "## Files",
            "",
            *[f"- {plain(name)}: {plain(text)}" for name, text in facts.files.items()],
            "",
        ]
    if facts.recipe:
        fence = "`" * (max((len(run) for run in re.findall("`+", facts.recipe)), default=2) + 1)
        lines += ["## Recipe", "", f"{fence}yaml", facts.recipe.rstrip(), fence, ""]
    return lines


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


def as_yaml(value: Any) -> str:
    """YAML that version 1.1 and 1.2 read as the same values."""
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
