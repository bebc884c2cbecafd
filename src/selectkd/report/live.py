"""A run at work, in a terminal: progress, time left, sparklines, and the newest measured text by verdict."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text as Styled

from selectkd.report.charts import number
from selectkd.report.escapes import shortened
from selectkd.report.looks import Looks, read_looks
from selectkd.report.run_files import RunFiles, read_run
from selectkd.report.verdict import in_bytes, in_time, sentences

BLOCKS = "▁▂▃▄▅▆▇█"
RECENT = 20
"""Steps whose mean time the time left rests on."""
LONGEST_TEXT = 600
MEASURES = ("kl", "perplexity", "tar")
SHOWN = (
    ("loss", "loss"), ("TAR", "tar"), ("KL", "kl"), ("gradient norm", "grad_norm"),
    ("tokens/s", "tokens_per_second"), ("memory", "peak_bytes"),
)  # fmt: skip


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """The values as blocks, the newest on the right, averaged to at most ``width`` of them.

    >>> sparkline([0, 1, 2, 3])
    '▁▃▆█'
    """
    if not values:
        return ""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    span = high - low or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in means)


def time_left(run: RunFiles) -> float | None:
    """Seconds until the last step at the pace of the last RECENT ones; None where that is not known."""
    noted = [line for line in run.timings if "resumed" not in line and line.get("time") is not None]
    times = [(line["step"], line["time"]) for line in noted[-RECENT:]]
    if run.planned is None or len(times) < 2 or times[-1][0] <= times[0][0]:
        return None
    (first, began), (last, now) = times[0], times[-1]
    return max(run.planned - last, 0) * max(now - began, 0) / (last - first)


def screen(run: RunFiles) -> Group:
    """All there is to see of a run."""
    left = time_left(run) if run.state == "running" else None
    head = Table.grid(padding=(0, 2))
    done = f"step {run.last_step}" + (f" of {run.planned}" if run.planned else "")
    bar = ProgressBar(total=run.planned, completed=run.last_step, width=30) if run.planned else ""
    head.add_row(
        Styled(shortened(run.name, 60)), run.state, bar, done, "" if left is None else f"{in_time(left)} left"
    )
    rows = Table.grid(padding=(0, 2))
    for name, key in SHOWN:
        points = run.column(key) or run.clock(key)
        if points:
            values = [value for _, value in points]
            rows.add_row(
                name, in_bytes(values[-1]) if key == "peak_bytes" else number(values[-1]), sparkline(values)
            )
    held = [line["kl"] for line in run.held_out if line.get("kl") is not None]
    if held:
        rows.add_row("held-out KL", number(held[-1]), sparkline(held))
    parts = [head, rows, Styled(shortened(sentences(run)[0], 300, keep=""))]
    newest = newest_look(run.folder)
    return Group(*parts, *([] if newest is None else [Styled(""), painted(newest)]))


def newest_look(folder: Path) -> Looks | None:
    """The newest look of a run alone; None without one, or while it is being written."""
    from selectkd.errors import DataError

    try:
        return read_looks(folder / "probe", newest=True)
    except DataError:
        return None


def painted(looks: Looks, text: int = 0) -> Styled:
    """A probe text with its rejected tokens underlined, accepted ones plain and the prompt dim."""
    look = looks.last
    here = look["sample"] == text
    verdict = dict(zip(look["token"][here].tolist(), look.accepted[here].tolist(), strict=True))
    styled = Styled()
    for place, token in enumerate(looks.texts[text].tokens):
        style = "dim" if place not in verdict else "blue" if verdict[place] else "underline dark_orange"
        styled.append(shortened(token, 80), style=style)
        if len(styled) > LONGEST_TEXT:
            return styled.append(" ...", style="dim")
    return styled


def lines(run: RunFiles, after: int) -> Iterator[tuple[int, str]]:
    """(step, a line) of each measurement and training line behind step ``after``, in order of steps."""
    speed = dict(run.clock("tokens_per_second"))
    of = f"/{run.planned}" if run.planned else ""
    trained = [
        (line["step"], 0, f"step {line['step']}{of}  loss {number(line.get('loss'))}  TAR {number(line.get('tar'))}  "
         f"{number(speed.get(line['step']))} tokens/s")
        for line in run.steps
    ]  # fmt: skip
    held = [
        (
            one["step"],
            1,
            "held-out text: " + "  ".join(f"{name} {number(one.get(name))}" for name in MEASURES),
        )
        for one in run.held_out
    ]
    for step, _, text in sorted(trained + held):
        if step > after:
            yield step, text


def states(folder: Path, *, every: float) -> Iterator[RunFiles]:
    """The run again and again, ``every`` seconds apart, the last time when it is no longer at work."""
    run = None
    while True:
        run = read_run(folder, with_looks=False, before=run)
        yield run
        if run.state != "running":
            return
        time.sleep(every)
