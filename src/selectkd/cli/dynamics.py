"""``selectkd study dynamics RUN``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.answer import FigureFile, JsonFile, write_answer
from selectkd.cli.terminal import say


def dynamics(
    run: Annotated[Path, typer.Argument(help="A run folder with its metrics.jsonl.")],
    json_file: JsonFile = None,
    figure: FigureFile = None,
) -> None:
    """Analyse how token acceptance (TAR) grew during a run.

    The output has the fitted rate kappa, decreases, changed decisions and the relation to held-out loss.
    """
    from selectkd.evals.dynamics import dynamics as measure
    from selectkd.evals.figures import check_figure, draw_dynamics

    check_figure(figure)
    seen = measure(run)
    if figure is not None:
        draw_dynamics(seen, figure)
    write_answer(json_file, seen.as_dict())
    say(f"{'step':>7}{'TAR':>8}{'held-out KL':>13}{'lost':>6}{'won':>6}")
    for look in seen.looks:
        kl = "" if look.kl is None else f"{look.kl:.4f}"
        say(f"{look.step:>7}{look.tar:>8.3f}{kl:>13}{look.lost:>6}{look.won:>6}")
    if seen.line is None:
        say("kappa: fewer than three measurements below TAR 1, so no rate can be fitted")
    else:
        one = seen.line
        say(
            f"kappa {one.kappa:.4g} [{one.low:.4g}, {one.high:.4g}] per unit of learning rate, {one.rate:.3g} a step "
            f"({one.used} measurements, R2 {one.r_squared:.2f}, residuals correlated {one.correlation:.2f})"
        )
    if seen.claim_share is not None:
        say(
            f"Theorem 1's inequality at that kappa holds between {seen.claim_share:.0%} of successive measurements"
        )
    say(
        f"TAR did not fall in {seen.nondecreasing_share:.0%} of the steps between measurements; flips: "
        f"{seen.lost} accepted to rejected, {seen.won} rejected to accepted"
    )
    if seen.rank_correlation is not None:
        say(f"TAR against held-out KL: rank correlation {seen.rank_correlation:+.2f}")
