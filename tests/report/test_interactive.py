"""Charts for a pointer: their specifications, and the page with them in a browser where one is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from report.opened import Opened
from report.test_page import Parsed
from report.written_run import write_run
from selectkd.report.charts import Chart, Line
from selectkd.report.interactive import available, specification
from selectkd.report.page import write_report

pytestmark = pytest.mark.skipif(not available(), reason="the extra `report` is not installed")

CURVE = Chart(
    "Loss", "nats", [Line("one", [(1, 2.0), (2, 1.0)]), Line("<b>two</b>", [(1, 3.0)])],
    marks=[("checkpoint", 2.0), ("resumed", 1.0)],
)  # fmt: skip
BARS = Chart("TAR", "share", [Line("before", [(0, 0.5), (1, 0.25)])], groups=["0+", "4+"], low=0.0)


def test_specifications_hold_every_point_and_mark_and_load_nothing() -> None:
    layers = specification(CURVE)["layer"]
    rows = layers[0]["data"]["values"]
    assert [(row["series"], row["x"], row["y"]) for row in rows] == [
        ("one", 1, 2.0),
        ("one", 2, 1.0),
        ("<b>two</b>", 1, 3.0),
    ]
    assert [layer["data"]["values"][0]["mark"] for layer in layers[1:]] == ["checkpoint", "resumed"]
    bars = specification(BARS)
    assert [(row["x"], row["y"]) for row in bars["data"]["values"]] == [("0+", 0.5), ("4+", 0.25)]
    assert bars["encoding"]["x"]["sort"] == ["0+", "4+"] and bars["mark"]["type"] == "bar"
    assert '"url"' not in json.dumps([layers, bars])


def test_a_page_with_charts_for_a_pointer_is_quiet_and_prints_its_plain_ones(
    browser: Any, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    content = write_report(run, interactive=True).read_text("utf-8")
    assert len(content) < 700_000 and set(json.loads(Parsed(content).text["script"][2])) >= {"Loss", "TAR"}
    page = Opened(browser, run / "report.html")
    last = page.tab.locator("figure[data-chart='Calibration']")
    assert "interactive" not in str(last.get_attribute("class")), "out of sight, nothing is drawn again"
    last.scroll_into_view_if_needed()
    page.tab.wait_for_selector("figure[data-chart='Calibration'].interactive")
    page.tab.locator("figure[data-chart='Loss'] .live path").first.hover(force=True)
    assert page.quiet(), page.messages
    assert not page.tab.locator("figure[data-chart='Loss'] svg.chart").is_visible()
    page.tab.emulate_media(media="print")
    assert page.tab.locator("figure[data-chart='Loss'] svg.chart").is_visible()
    assert not page.tab.locator("figure[data-chart='Loss'] .live").is_visible()
