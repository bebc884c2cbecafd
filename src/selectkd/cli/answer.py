"""A verb's answer as JSON where ``--json FILE`` says: in a file, or on stdout for ``-``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from selectkd.cli.terminal import say
from selectkd.errors import ConfigError

JsonFile = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write the numbers to a JSON file; - prints them."),
]
FigureFile = Annotated[
    Path | None,
    typer.Option("--figure", metavar="FILE", help="Draw a figure: a name that ends in .png, .svg or .pdf."),
]
STDOUT = Path("-")


def check_answer(path: Path | None, *, flag: str = "--json") -> None:
    """ConfigError, before anything is computed, unless the answer can be written to ``path``."""
    if path is not None and path != STDOUT and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{flag} {path}: name a file in a folder that exists, or - for the terminal.")


def write_answer(path: Path | None, answer: Any) -> None:
    """Writes the answer; a number that is not finite becomes null. None writes nothing."""
    if path is None:
        return
    text = json.dumps(_finite(answer), indent=2, allow_nan=False)
    if path == STDOUT:
        say(text)
    else:
        from selectkd.data.durable import write_plain

        write_plain(path, (text + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
