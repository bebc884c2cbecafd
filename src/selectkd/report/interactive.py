"""The same charts for a pointer: Altair's specifications and the program that draws them, inside the page.

Altair and vl-convert are the extra ``report``; without them a page keeps its SVG charts, which it prints either way.
"""

from __future__ import annotations

import base64
import gzip
import importlib.util
from functools import lru_cache
from typing import Any

from selectkd.report.charts import ACROSS, Chart, as_data

SNIPPET = "window.vegaEmbed = vegaEmbed;"
HEIGHT = 150
MARKS = {"evaluation": "#7a8496", "checkpoint": "#9a5cc0", "resumed": "#2a9a78", "skipped": "#c8563c"}
"""Colours that are seen on a light and on a dark page."""


def available() -> bool:
    """Whether the extra ``report`` is installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("altair", "vl_convert"))


@lru_cache(maxsize=1)
def program() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, from vl-convert's own copy."""
    import vl_convert

    return vl_convert.javascript_bundle(SNIPPET)


@lru_cache(maxsize=1)
def packed_program() -> str:
    """The program compressed, as base64."""
    return base64.b64encode(gzip.compress(program().encode(), 9, mtime=0)).decode()


def specification(chart: Chart) -> dict[str, Any]:
    """A chart as a Vega-Lite specification, checked by Altair: values under the pointer, lines a click singles out."""
    import altair as alt

    data = as_data(chart)
    names = list(dict.fromkeys(row["series"] for row in data["rows"]))
    legend = None if len(names) < 2 else alt.Legend(title=None)
    scale = alt.Scale(domain=names)
    y = alt.Y("y:Q", title=None, axis=alt.Axis(tickCount=4), scale=alt.Scale(zero=chart.low == 0.0))
    colour = alt.Color("series:N", sort=None, scale=scale, legend=legend)
    tooltip = [
        alt.Tooltip("series:N", title=chart.title),
        alt.Tooltip("y:Q", title=chart.unit, format=".4~g"),
    ]
    if chart.groups:
        rows = [{**row, "x": chart.groups[int(row["x"])]} for row in data["rows"]]
        x = alt.X("x:N", sort=list(chart.groups), title=chart.x, axis=alt.Axis(labelAngle=0))
        beside, where = alt.XOffset("series:N", sort=names), alt.Tooltip("x:N", title=chart.x)
        drawn: Any = alt.Chart(alt.Data(values=rows)).mark_bar()
        drawn = drawn.encode(x=x, y=y, color=colour, xOffset=beside, tooltip=[*tooltip, where])
        return drawn.properties(width="container", height=HEIGHT).to_dict()
    chosen = alt.selection_point(fields=["series"], bind="legend")
    drawn = alt.Chart(alt.Data(values=data["rows"])).mark_line(point=alt.OverlayMarkDef(size=22))
    drawn = drawn.encode(
        x=alt.X("x:Q", title=chart.x, axis=alt.Axis(tickCount=5)), y=y, color=colour,
        strokeDash=alt.StrokeDash("series:N", sort=None, legend=legend, scale=scale),
        opacity=alt.condition(chosen, alt.value(1.0), alt.value(0.15)),
        tooltip=[*tooltip, alt.Tooltip("x:Q", title=chart.x)],
    ).add_params(chosen, alt.selection_interval(bind="scales", encodings=["x"]))  # fmt: skip
    return alt.layer(drawn, *_marks(chart)).properties(width="container", height=HEIGHT).to_dict()


def _marks(chart: Chart) -> list[Any]:
    """A layer for each kind of mark: short at the foot of the chart, or across it."""
    import altair as alt

    layers = []
    for kind in dict.fromkeys(kind for kind, _ in chart.marks):
        rows = [{"mark": kind, "step": at} for one, at in chart.marks if one == kind]
        rule = alt.Chart(alt.Data(values=rows)).mark_rule(color=MARKS[kind], strokeWidth=3)
        top = alt.value(0 if kind in ACROSS else HEIGHT - 8)
        tooltip = [alt.Tooltip("mark:N", title="mark"), alt.Tooltip("step:Q", title=chart.x)]
        layers.append(
            rule.encode(x=alt.X("step:Q", title=chart.x), y=top, y2=alt.value(HEIGHT), tooltip=tooltip)
        )
    return layers
