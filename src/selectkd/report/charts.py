"""Charts as plain data, drawn as SVG: lines over steps and grouped bars. Colours and fonts are the page's style sheet.

The same data is what the interactive charts are made of where the extra ``report`` is installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from markupsafe import Markup, escape

from selectkd.report.escapes import clean
from selectkd.report.lenient import is_number

WIDTH, HEIGHT = 420.0, 210.0
LEFT, RIGHT, TOP, BOTTOM = 54.0, 12.0, 12.0, 40.0
MOST_POINTS = 600
"""Points of a drawn line: more than one a pixel are averaged."""
ACROSS = ("resumed", "skipped")
"""Marks that cross a chart; others stand at its foot."""
SERIES = 6
"""Colours and dashes of the style sheet; a seventh series begins again."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: what it is, and its points (x, y), of which those that are no numbers are left out.

    dots: whether each point is marked.
    """

    name: str
    points: Sequence[tuple[float, float]]
    style: int = 0
    dots: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", clean(self.name, keep=""))
        drawn = [(x, y) for x, y in self.points if is_number(x) and is_number(y)]
        object.__setattr__(self, "points", drawn)


@dataclass(frozen=True)
class Chart:
    """Lines over x, or bars of groups where ``groups`` names them: then a line's points are (group, value).

    marks: (kind, x) of vertical marks, kind one of checkpoint, evaluation, resumed, skipped. level: a y to draw across.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    x: str = "step"
    groups: Sequence[str] = ()
    marks: Sequence[tuple[str, float]] = ()
    level: tuple[str, float] | None = None
    low: float | None = None
    high: float | None = None
    note: str = field(default="")

    @property
    def empty(self) -> bool:
        return not any(line.points for line in self.lines)


def number(value: float | None, digits: int = 3) -> str:
    """A number for people: three digits, zeros at the end among them, thousands apart; a dash where there is none.

    >>> number(0.012345), number(0.019), number(12345.6), number(None), number(2), number(2.0), number(1e20)
    ('0.0123', '0.0190', '12,346', '-', '2', '2.00', '1e+20')
    """
    if value is None or not is_number(value):
        return "-"
    if abs(value) >= 1e12:
        return f"{value:.{digits}g}"
    if isinstance(value, Integral) or value == 0:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    return f"{value:#.{digits}g}".rstrip(".")


def tick(value: float) -> str:
    """A number of an axis, or one that was chosen: no zero at its end.

    >>> tick(0.25), tick(0.30000000000000004), tick(60.0), tick(12000)
    ('0.25', '0.3', '60', '12,000')
    """
    shown = number(int(value) if abs(value) < 1e12 and value == int(value) else value, 6)
    return shown.rstrip("0").rstrip(".") if "." in shown and "e" not in shown else shown


def counted(n: int, noun: str) -> str:
    """A number with what it counts.

    >>> counted(1, "step"), counted(2000, "step")
    ('1 step', '2,000 steps')
    """
    return f"{number(n)} {noun}{'' if n == 1 else 's'}"


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """At most ``most`` + 1 round numbers from low to high.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    if not high > low:
        return [low]
    raw = (high - low) / most
    if raw < 1e-300:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 12) for i in range(count)]


def draw(chart: Chart) -> Markup:
    """A chart as SVG with a text for those who do not see it."""
    lines = [Line(one.name, _thinned(one.points), one.style, one.dots) for one in chart.lines if one.points]
    if not lines:
        return Markup("")
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-label="{escape(_label(chart))}">'
    ]
    box = _Box.around(chart, lines)
    parts += [*_axes(chart, box), *(_bars if chart.groups else _lines)(lines, box, chart)]
    return Markup("\n".join([*parts, "</svg>"]))


@dataclass(frozen=True)
class _Box:
    """The scales of a chart."""

    x: tuple[float, float]
    y: tuple[float, float]

    @classmethod
    def around(cls, chart: Chart, lines: Sequence[Line]) -> _Box:
        xs = [x for line in lines for x, _ in line.points] + [x for _, x in chart.marks]
        ys = [y for line in lines for _, y in line.points] + ([chart.level[1]] if chart.level else [])
        low = min(ys) if chart.low is None else min(chart.low, *ys)
        high = max(ys) if chart.high is None else max(chart.high, *ys)
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        low = low - (pad if chart.low is None else 0.0)
        high = high + (pad if chart.high is None else 0.0)
        across = (-0.5, len(chart.groups) - 0.5) if chart.groups else (min(xs), max(xs))
        return cls(across if across[1] > across[0] else (across[0] - 0.5, across[0] + 0.5), (low, high))

    def at(self, x: float, y: float) -> tuple[float, float]:
        (left, right), (low, high) = self.x, self.y
        across = LEFT + (x - left) / (right - left) * (WIDTH - LEFT - RIGHT)
        return round(across, 1), round(
            HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1
        )


def _axes(chart: Chart, box: _Box) -> list[str]:
    parts = []
    for value in ticks(*box.y, 4):
        _, y = box.at(box.x[0], value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4.5}" text-anchor="end">{tick(value)}</text>'
        )
    named = list(enumerate(chart.groups)) if chart.groups else [(at, tick(at)) for at in ticks(*box.x, 5)]
    for at, name in named:
        x, _ = box.at(at, box.y[0])
        parts.append(
            f'<text class="tick" x="{x}" y="{HEIGHT - 23}" text-anchor="middle">{escape(name)}</text>'
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">{escape(chart.x)}</text>'
    )
    for kind, at in chart.marks:
        x, _ = box.at(at, 0.0)
        top = TOP if kind in ACROSS else HEIGHT - BOTTOM - 5
        title = f"{kind} at step {tick(at)}"
        place = f'x1="{x}" x2="{x}" y1="{top}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line class="mark {kind}" {place}><title>{title}</title></line>')
    if chart.level is not None:
        name, value = chart.level
        _, y = box.at(0.0, value)
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 4}" text-anchor="end">{escape(name)}</text>'
        )
    return parts


def _lines(lines: Sequence[Line], box: _Box, chart: Chart) -> list[str]:
    parts = []
    for line in lines:
        style = f"s{line.style % SERIES}"
        points = [box.at(x, y) for x, y in line.points]
        drawn = " ".join(f"{x},{y}" for x, y in points)
        parts.append(
            f'<polyline class="line {style}" points="{drawn}"><title>{escape(line.name)}</title></polyline>'
        )
        if line.dots or len(points) == 1:
            for (x, y), (step, value) in zip(points, line.points, strict=True):
                title = f"{line.name}, {chart.x} {tick(step)}: {number(value)}"
                parts.append(
                    f'<circle class="dot {style}" cx="{x}" cy="{y}" r="3"><title>{escape(title)}</title></circle>'
                )
    return parts


def _bars(lines: Sequence[Line], box: _Box, chart: Chart) -> list[str]:
    parts, width = [], 0.8 / len(lines)
    for number_of, line in enumerate(lines):
        for group, value in line.points:
            left, top = box.at(group - 0.4 + width * number_of, value)
            right, foot = box.at(group - 0.4 + width * (number_of + 1), max(box.y[0], 0.0))
            title = f"{line.name}, {chart.groups[int(group)]}: {number(value)}"
            parts.append(
                f'<rect class="bar s{line.style % SERIES}" x="{left}" y="{min(top, foot)}" '
                f'width="{max(right - left - 1, 0.5):.1f}" height="{abs(foot - top):.1f}">'
                f"<title>{escape(title)}</title></rect>"
            )
    return parts


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    pieces = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pieces]


def _label(chart: Chart) -> str:
    ends = [
        f"{line.name} from {number(line.points[0][1])} to {number(line.points[-1][1])}"
        for line in chart.lines
        if line.points and not chart.groups
    ]
    bars = [
        f"{line.name}: " + ", ".join(f"{chart.groups[int(at)]} {number(value)}" for at, value in line.points)
        for line in chart.lines
        if chart.groups
    ]
    return f"{chart.title}, {chart.unit}. " + "; ".join([*ends, *bars])


def as_data(chart: Chart) -> dict[str, Any]:
    """A chart's rows as plain data."""
    return {
        "title": chart.title, "unit": chart.unit, "x": chart.x, "groups": list(chart.groups),
        "rows": [
            {"series": line.name, "x": x, "y": y} for line in chart.lines for x, y in _thinned(line.points)
        ],
    }  # fmt: skip
