"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps|xpu",
        help="Where the models run. auto takes an accelerator if there is one.",
    ),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="NAME",
        help="The environment variable that holds the server's key: its name, never the key.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="The number format of the weights: float32 or bfloat16."),
]
