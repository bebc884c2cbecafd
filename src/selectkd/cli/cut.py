"""``selectkd cut RECIPE --out FOLDER``: the student that a recipe cuts from its teacher, written once for all runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, show_progress, without_other_bars
from selectkd.errors import ConfigError


def cut(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file with student.from_teacher.")],
    out: Annotated[str, typer.Option("--out", metavar="FOLDER", help="The folder to write the student to.")],
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
    device: Device = "auto",
) -> None:
    """Cut a student from its teacher and save it as a model folder.

    Recipes can then name that folder in student.model.
    """
    from selectkd.config import load_recipe

    checked = load_recipe(recipe, changes or [])
    if checked.student.from_teacher is None:
        raise ConfigError(
            f"{recipe} names its student, student.model = {checked.student.model!r}, so there is nothing to cut. "
            "Use student: {from_teacher: {layers: N}}."
        )

    from selectkd.models.devices import training_device
    from selectkd.models.save import check_target, save_student
    from selectkd.training.assembly import assemble

    without_other_bars()
    check_target(Path(out))
    plain = checked.training.model_copy(update={"lora": None, "gradient_checkpointing": False})
    assembly = assemble(
        checked.model_copy(update={"training": plain}),
        device=training_device(device),
        stage=show_progress if sys.stderr.isatty() else None,
    )
    kl = (
        f", held-out KL to the teacher {assembly.cut.kl[-1]:.4g} nats"
        if assembly.cut and assembly.cut.kl
        else ""
    )
    folder = save_student(
        assembly.student, assembly.tokenizer, out, f"# {assembly.student_source}\n", vision=assembly.vision
    )
    say(f"{folder}: {assembly.student_source}{kl}")
    say(f"train it with --set student.model={folder}")
