"""Figures of evaluations, as PNG, SVG or PDF by the name of the file; matplotlib is an extra and loaded here alone."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selectkd.config.extras import how_to_install
from selectkd.data.durable import write_plain
from selectkd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from selectkd.config.study import Study
    from selectkd.evals.dynamics import Dynamics
    from selectkd.evals.landscape import Landscape

SUFFIXES = (".png", ".svg", ".pdf")


def check_figure(path: Path | None) -> None:
    """ConfigError, before anything is computed, unless a figure can be drawn to ``path``; None needs nothing."""
    if path is None:
        return
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--figure {path}: the name must end in one of {', '.join(SUFFIXES)}.")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--figure {path}: the folder {path.parent} does not exist. Make it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(
            f"figures need matplotlib. Install it: {how_to_install('figures')}, or leave out --figure."
        )


def draw_dynamics(seen: Dynamics, path: Path) -> None:
    """TAR over steps, log(1 - TAR) with its fit, TAR against held-out KL, acceptance by teacher entropy."""
    figure = _figure(10, 7)
    tar, line, loss, sure = figure.subplots(2, 2).ravel()
    steps = [look.step for look in seen.looks]
    tars = [look.tar for look in seen.looks]
    tar.plot(steps, tars, "o-")
    tar.set(xlabel="step", ylabel="TAR", title="TAR on the fixed probe batch", ylim=(0, 1))

    import numpy as np

    below = [look for look in seen.looks if look.tar < 1]
    x = np.array([look.learned for look in below])
    line.plot(x, np.log1p(-np.array([look.tar for look in below])), "o")
    fitted = seen.line
    if fitted is not None:
        line.plot(x, fitted.intercept - fitted.kappa * x, "-")
        line.set_title(f"kappa {fitted.kappa:.3g} [{fitted.low:.3g}, {fitted.high:.3g}]")
    line.set(xlabel="summed learning rate", ylabel="log(1 - TAR)")

    held = [look for look in seen.looks if look.kl is not None]
    loss.plot([look.kl for look in held], [look.tar for look in held], "o-")
    loss.set(xlabel="held-out KL (nats a token)", ylabel="TAR", title="TAR against held-out loss")

    for look, label in ((seen.looks[0], "first look"), (seen.looks[-1], "last look")):
        names = [f"{one['from']:g}+" for one in look.by_entropy]
        sure.plot(names, [one["acceptance"] for one in look.by_entropy], "o-", label=label)
    if sure.get_lines():
        sure.legend()
    sure.set(xlabel="teacher entropy (nats)", ylabel="acceptance", title="who is accepted", ylim=(0, 1))
    _save(figure, path)


def draw_landscapes(seen: Mapping[str, Landscape], path: Path) -> None:
    """Every student's loss along its line in one panel, and its square beside it where there is one."""
    squares = [(name, one) for name, one in seen.items() if one.grid]
    figure = _figure(5 * (1 + len(squares)), 4.5)
    axes = figure.subplots(1, 1 + len(squares), squeeze=False)[0]
    for name, one in seen.items():
        axes[0].plot(one.at, one.line, label=_shown(name))
    axes[0].set(xlabel="along a filter-normalised direction", ylabel="loss (nats)")
    axes[0].legend()
    for axis, (name, one) in zip(axes[1:], squares, strict=True):
        drawn = axis.contour(one.grid_at, one.grid_at, one.grid, levels=12)
        axis.clabel(drawn, fontsize=7)
        axis.set(title=_shown(name), xlabel="second direction", ylabel="first direction")
    _save(figure, path)


def draw_study(study: Study, rows: Mapping[Any, Any], path: Path) -> None:
    """The outcome of every arm: a dot for each seed, the mean and its 95% interval (Student's t). Beside it, where runs
    were looked at on the way, the mean held-out KL of each arm's seeds over the steps, in the arm's colour."""
    from matplotlib import colormaps

    from selectkd.evals.statistics import t_interval
    from selectkd.evals.studies.rows import number
    from selectkd.evals.studies.study import arms_of, chosen_rates

    chosen, arms = chosen_rates(study, rows), [arm.name for arm in arms_of(study)]
    found = {arm: [rows.get((arm, seed, chosen.get(arm)), {}) for seed in study.seeds] for arm in arms}
    curves = {arm: curve for arm in arms if len(curve := mean_curve(found[arm])) > 2}
    figure = _figure(12 if curves else 8, 1.2 + 0.3 * len(arms))
    axis, *beside = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
    for at, arm in enumerate(reversed(arms)):
        colour = colormaps["viridis"](0.9 * at / max(1, len(arms) - 1))
        values = [one for row in found[arm] if (one := number(row, study.outcome)) is not None]
        axis.plot(values, [at] * len(values), "o", color="0.7", markersize=4)
        if len(values) > 1:
            mean = t_interval(values)
            axis.errorbar([mean.value], [at], xerr=[[mean.value - mean.low], [mean.high - mean.value]],
                          fmt="s", color=colour, capsize=3)  # fmt: skip
        for curve in beside if arm in curves else ():
            curve.plot(*zip(*curves[arm], strict=True), color=colour)
    axis.set_yticks(range(len(arms)), [_shown(arm) for arm in reversed(arms)])
    axis.set(xlabel=study.outcome.replace("_", " "))
    for curve in beside:
        curve.set(xlabel="step", ylabel="held-out KL (nats)")
    _save(figure, path)


def mean_curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, mean held-out KL) of runs at the steps at which all have a finite KL; nothing without a run that ended.

    >>> runs = [{"curve": [[0, 1.0, 0.5], [5, 0.6, 0.7]]}, {"curve": [[0, 0.8, 0.5], [5, None, None]]}]
    >>> mean_curve([*runs, {"error": "killed"}])
    [(0, 0.9)]
    """
    looks = [
        {step: kl for step, kl, *_ in row["curve"] if kl is not None}
        for row in rows
        if row.get("curve") and not row.get("error")
    ]
    common = sorted(set.intersection(*map(set, looks))) if looks else []
    return [(step, sum(one[step] for one in looks) / len(looks)) for step in common]


def _figure(width: float, height: float) -> Any:
    """A figure outside matplotlib's global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: Path) -> None:
    """The same figure gives the same bytes."""
    import matplotlib

    drawn, kind = io.BytesIO(), path.suffix.lower().removeprefix(".")
    with matplotlib.rc_context({"svg.hashsalt": "selectkd"}):
        figure.savefig(drawn, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    write_plain(path, drawn.getvalue())


def _shown(name: str) -> str:
    """The end of a path as matplotlib draws it letter by letter: ``$`` begins no formula, ``_`` hides no label."""
    end = name[-40:].replace("$", r"\$")
    return f" {end}" if end.startswith("_") else end
