"""``selectkd study landscape RUN``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from selectkd.cli.answer import FigureFile, JsonFile, write_answer
from selectkd.cli.options import Device
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, show_progress, without_other_bars
from selectkd.errors import ConfigError


def landscape(
    run: Annotated[Path, typer.Argument(help="A finished run. The loss is measured on its held-out text.")],
    compare: Annotated[
        list[str] | None,
        typer.Option("--compare", help="Another run or model to measure on the same text. Repeatable."),
    ] = None,
    before: Annotated[
        bool, typer.Option("--before", help="Also measure the student before training.")
    ] = False,
    loss: Annotated[
        Literal["text", "kl"],
        typer.Option("--loss", help="text: loss on the text's tokens. kl: KL divergence from the teacher."),
    ] = "text",
    samples: Annotated[int, typer.Option("--samples", min=1, help="Held-out texts to measure on.")] = 8,
    points: Annotated[
        int, typer.Option("--points", min=3, help="Points on the line through the weights.")
    ] = 21,
    grid: Annotated[
        int, typer.Option("--grid", min=0, help="Points on each side of the square. 0 leaves the square out.")
    ] = 0,
    reach: Annotated[
        float,
        typer.Option("--reach", help="How far the line goes, relative to the norm of each row of weights."),
    ] = 1.0,
    kicks: Annotated[
        int, typer.Option("--kicks", min=0, help="Random directions to measure sharpness in.")
    ] = 8,
    hessian: Annotated[
        bool, typer.Option("--hessian/--no-hessian", help="Compute the top eigenvalue of the Hessian.")
    ] = True,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed for the directions, which every student shares.")
    ] = 0,
    device: Device = "auto",
    allow_plugin: AllowPlugin = None,
    json_file: JsonFile = None,
    figure: FigureFile = None,
) -> None:
    """Measure how flat the loss is around a student's weights."""
    from selectkd.evals.figures import check_figure, draw_landscapes

    check_figure(figure)
    if not 0 < reach < float("inf"):
        raise ConfigError(f"--reach {reach:g} must be above 0: the line goes from -reach to reach.")
    without_other_bars()

    from selectkd.evals.heldout import divergence_loss, heldout_batch, plan_of, text_loss
    from selectkd.evals.landscape import RADIUS
    from selectkd.evals.landscape import landscape as measure
    from selectkd.evals.runs import load_student, load_student_before
    from selectkd.models.devices import use_device

    on = use_device(device)
    plan = plan_of(run)
    batch = heldout_batch(plan, samples).to(on)
    if not plan.heldout:
        show_progress(f"{run} has no held-out text: the loss is measured on its training text")
    loaders: dict[str, Any] = {str(run): lambda: load_student(run, device=on)}
    if before:
        loaders[f"{run} before"] = lambda: load_student_before(run, device=on)
    loaders |= {name: lambda name=name: load_student(name, device=on) for name in compare or []}
    teacher = plan.teacher.loaded().model.to(on) if loss == "kl" else None
    found = {}
    for name, load in loaders.items():
        show_progress(f"{name}: loading")
        model = load().model.requires_grad_(False)
        show_progress(f"{name}: measuring")
        closure = text_loss(model, batch) if teacher is None else divergence_loss(model, teacher, batch)
        found[name] = measure(
            list(model.parameters()), closure, points=points, grid=grid, reach=reach, kicks=kicks,
            hessian=hessian, seed=seed,
        )  # fmt: skip
    if figure is not None:
        draw_landscapes(found, figure)
    settings = {
        "loss": loss, "samples": len(batch.completion), "tokens": int(batch.completion.sum()), "seed": seed,
        "held_out": bool(plan.heldout), "reach": reach, "kicks": kicks, "radius": RADIUS, "dtype": "float32",
    }  # fmt: skip
    students = [{"student": name, **asdict(seen)} for name, seen in found.items()]
    write_answer(json_file, {"students": students, "settings": settings})
    say(f"{'student':<40}{'loss':>9} {'top eigenvalue':>15} {'sharpness':>10} {'[95%':>9} {']':>9}")
    for name, seen in found.items():
        top = "" if seen.top_eigenvalue is None else f"{seen.top_eigenvalue:.4g}"
        kick = seen.sharpness
        rise = "" if kick is None else f" {kick.value:>10.4f} {kick.low:>9.4f} {kick.high:>9.4f}"
        say(f"{name[-39:]:<40}{seen.loss:>9.4f} {top:>15}{rise}")
