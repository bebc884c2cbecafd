"""The charts of one or more runs: curves over steps, bins of the probe, the proposal's rank, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from selectkd.report.charts import Chart, Line
from selectkd.report.looks import ENTROPIES, POSITIONS, RANKS, Look, Looks, binned, calibration
from selectkd.report.run_files import RunFiles

OVER_STEPS = (
    ("Loss", "loss", "of the objective", None, None),
    ("Held-out KL", "kl", "nats a token", 0.0, None),
    ("TAR", "tar", "share accepted", 0.0, 1.0),
    ("Bite", "bite", "share of signal removed", 0.0, None),
    ("Gradient norm", "grad_norm", "before clipping", 0.0, None),
    ("Learning rate", "lr", "a step", 0.0, None),
)
HELD_OUT = ("kl",)


def over_steps(runs: Sequence[RunFiles]) -> list[Chart]:
    """Loss, held-out KL, TAR, bite, gradient norm and learning rate of every run."""
    marks = _marks(runs[0]) if len(runs) == 1 else []
    charts = []
    for title, name, unit, low, high in OVER_STEPS:
        lines = []
        for style, run in enumerate(runs):
            called = title if len(runs) == 1 else run.name
            held = [(line["step"], line[name]) for line in run.held_out if line.get(name) is not None]
            if name not in HELD_OUT:
                lines.append(Line(called, run.column(name), style))
            if name in HELD_OUT or (name == "tar" and held):
                lines.append(
                    Line(f"{called}, held out", held, style + (len(runs) == 1 and name == "tar"), dots=True)
                )
        charts.append(Chart(title, unit, lines, marks=marks, low=low, high=high))
    return charts


def _marks(run: RunFiles) -> list[tuple[str, float]]:
    at = {
        "checkpoint": run.checkpoints,
        "evaluation": [line["step"] for line in run.evaluations],
        "resumed": run.resumes,
        "skipped": run.skipped,
    }
    return [(kind, float(step)) for kind, steps in at.items() for step in steps]


def of_probe(looks: Looks) -> list[Chart]:
    """TAR and loss by place and by the teacher's entropy, and the proposal's rank: the first look beside the last."""
    ends = list(dict.fromkeys([looks.first.step, looks.last.step]))
    both = [look for look in looks.looks if look.step in ends]
    offset = looks.offset
    charts = []
    for title, of, edges, unit in (
        ("by place in the completion", lambda _: offset, POSITIONS, "token"),
        ("by the teacher's entropy", lambda look: look.columns.get("teacher_entropy"), ENTROPIES, "nats"),
    ):
        for what, column in (("TAR", "acceptance"), ("Loss", "divergence")):
            chart = _bins(f"{what} {title}", column, [(look, of(look)) for look in both], edges, unit)
            if chart is not None:
                charts.append(chart)
    return [*charts, *_ranks(both)]


def _bins(
    title: str, column: str, looks: Sequence[tuple[Look, object]], edges: Sequence[float], unit: str
) -> Chart | None:
    """A chart of a column's mean in each bin; None where what it is binned by is not known."""
    lines = []
    names = _spans(edges, whole=unit == "token")
    for style, (look, of) in enumerate(looks):
        if of is None or np.isnan(np.asarray(of, float)).all():
            return None
        found = binned(look[column], np.nan_to_num(np.asarray(of, float)), edges)
        points = [(list(edges).index(edge), value) for edge, _, value in found]
        lines.append(Line(_called(look), points, style))
    names = names[
        : int(max((x for line in lines for x, _ in line.points), default=0)) + 1
    ]  # none beyond the last
    high = 1.0 if column == "acceptance" else None
    unit_of = "share accepted" if column == "acceptance" else "divergence, nats a token"
    return Chart(title, unit_of, lines, x=unit, groups=names, low=0.0, high=high)


def _ranks(looks: Sequence[Look]) -> list[Chart]:
    names = _spans(RANKS, whole=True)
    lines = []
    for style, look in enumerate(looks):
        ranks = look.columns.get("rank")
        if ranks is None or not (ranks > 0).any():
            return []
        ranks = np.where(ranks > 0, ranks, np.iinfo(np.int32).max)  # outside a stored top-K: beyond all ranks
        found = binned(np.ones(len(ranks)), ranks, RANKS)
        lines.append(
            Line(_called(look), [(RANKS.index(int(edge)), n / len(ranks)) for edge, n, _ in found], style)
        )
    title = "Rank of the student's proposal with the teacher"
    return [Chart(title, "share of tokens", lines, x="rank", groups=names, low=0.0)]


def _spans(edges: Sequence[float], *, whole: bool) -> list[str]:
    """What each bin [edge, next) is called; the last is open.

    >>> _spans((1, 2, 5), whole=True), _spans((0.0, 0.1, 0.5), whole=False)
    (['1', '2-4', '5+'], ['0-0.1', '0.1-0.5', '0.5+'])
    """
    return [
        f"{first:g}" if whole and next_ == first + 1 else f"{first:g}-{next_ - whole:g}"
        for first, next_ in pairwise(edges)
    ] + [f"{edges[-1]:g}+"]


def calibrations(looks: Looks) -> tuple[list[tuple[str, float]], list[Chart]]:
    """(who, ECE) and the reliability of the teacher, the student before and the student after."""
    named = [("teacher", looks.last, "teacher"), ("student before", looks.first, "student")]
    if len(looks.looks) > 1:
        named.append(("student after", looks.last, "student"))
    errors, lines = [], []
    for style, (name, look, who) in enumerate(named):
        found = calibration(look, who)
        if found is None:
            continue
        errors.append((name, found[0]))
        lines.append(Line(name, [(sure, right) for sure, _, right in found[1]], style, dots=True))
    if not lines:
        return [], []
    lines.append(Line("perfect", [(0.0, 0.0), (1.0, 1.0)], 5))
    return errors, [Chart("Calibration", "share right", lines, x="confidence", low=0.0, high=1.0)]


def _called(look: Look) -> str:
    return "before" if look.step == 0 else f"step {look.step}"
