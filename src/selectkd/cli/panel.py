"""``selectkd study panel RECIPE``."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, without_other_bars

SAMPLES = 32
"""Training samples that are used where a recipe holds no text out."""


def panel(
    recipe: Annotated[
        str, typer.Argument(help="The recipe. Its student is used untrained, on its held-out text.")
    ],
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
    device: Device = "auto",
    json_file: JsonFile = None,
) -> None:
    """Compare which tokens each verifier and selector keeps.

    The table has rates, overlaps and the loss and gradient that each removes.
    """
    from selectkd.config import load_recipe

    checked = load_recipe(recipe, changes or [])

    from selectkd.data.examples import Examples
    from selectkd.data.order import Padded
    from selectkd.data.render import pad_id_of
    from selectkd.evals.studies.panel import gates
    from selectkd.evals.studies.panel import panel as compare_gates
    from selectkd.models.devices import training_device
    from selectkd.training.assembly import assemble
    from selectkd.training.run_folder import date_of

    without_other_bars()
    on = training_device(device)
    with tempfile.TemporaryDirectory() as empty:  # nothing is left in a run folder
        training = checked.training.model_copy(update={"output_dir": empty})
        date = date_of(Path(checked.training.output_dir))
        assembly = assemble(checked.model_copy(update={"training": training}), device=on, date=date)
    batches = assembly.heldout
    if not batches:
        examples = Examples.joined([source.examples for source in assembly.sources])[:SAMPLES]
        size, pad = checked.training.batch_size, pad_id_of(assembly.tokenizer)
        batches = Padded(examples, pad_id=pad, batch_size=size)
    seen = compare_gates(
        assembly.student,
        assembly.teacher,
        batches,
        gates(reference=checked.reference is not None),
        beta=assembly.beta.end,
        verify_temperature=checked.objective.verify_temperature,
        seed=checked.training.seed,
        chunk=checked.training.chunk,
    )
    write_answer(json_file, seen)
    _table(seen)


def _table(seen: dict[str, Any]) -> None:
    say(f"{seen['n']} rows, beta {seen['beta']}")
    first = next(iter(seen["gates"]))
    say(f"{'gate':<18}{'rate':>7}{'loss removed':>14}{'gradient removed':>18}   overlap with {first}")
    for name, one in seen["gates"].items():
        overlap = 1.0 if name == first else seen["jaccard"][name][first]
        say(
            f"{name:<18}{one['rate']:>7.3f}{one['loss_removed']:>14.3f}{one['gradient_removed']:>18.3f}   {overlap:.3f}"
        )
    say("rate by the teacher's entropy, each bin with its lower edge in nats:")
    for name, one in seen["gates"].items():
        bins = "  ".join(f"{part['from']:g}: {part['acceptance']:.2f}" for part in one["by_entropy"])
        say(f"  {name:<18}{bins}")
