"""``--device``: one option of every verb that runs a model."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps|xpu",
        help="Where the models run; auto takes an accelerator where there is one.",
    ),
]
