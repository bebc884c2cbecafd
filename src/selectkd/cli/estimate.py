"""``selectkd estimate RECIPE``: the memory a run needs, before it is started."""

from __future__ import annotations

from typing import Annotated

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say
from selectkd.errors import ConfigError


def estimate(
    recipe: Annotated[str, typer.Argument(help="The recipe, a YAML file.")],
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens in the longest sample. Default: training.max_length.")
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="auto|cpu|cuda|mps|xpu",
            help="The kind of device the run will use. This machine need not have one.",
        ),
    ] = "auto",
    json_file: JsonFile = None,
) -> None:
    """Estimate the memory and disk space that a run needs.

    The memory is that of one process, part by part. No weights are loaded.
    """
    from selectkd.config import load_recipe

    checked = load_recipe(recipe, changes or [])

    import selectkd.training.run  # noqa: F401  what a run imports is in memory as well
    from selectkd.models.devices import device_of
    from selectkd.training.preflight.estimate import estimate as count

    where = device_of("auto") if device == "auto" else _kind(device)
    memory = count(checked, length=length, device=where).as_dict()
    write_answer(json_file, memory)
    for name, size in memory.items():
        say(f"{name.replace('_', ' '):<14} {size / 2**20:>12,.1f} MiB")


def _kind(device: str) -> str:
    """The kind of a device, here or not; ConfigError for a word that is none."""
    kind = device.partition(":")[0]
    if kind not in ("cpu", "cuda", "mps", "xpu"):
        raise ConfigError(f"--device {device} is not a device. Use auto, cpu, cuda, mps or xpu.")
    return kind
