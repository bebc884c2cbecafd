"""A verb's answer as JSON: in a file for ``--json FILE``, alone on stdout for ``--json -``."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from selectkd.errors import ConfigError

JsonFile = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE|-", help="Write the results as JSON to a file, or to standard output with -."
    ),
]
FigureFile = Annotated[
    Path | None,
    typer.Option("--figure", metavar="FILE", help="Draw a figure into this .png, .svg or .pdf file."),
]
STDOUT = Path("-")
ANSWERS: ContextVar[TextIO | None] = ContextVar("ANSWERS", default=None)
"""Standard output, while only the answer may go there."""


def check_answer(path: Path | None, *, flag: str = "--json") -> None:
    """ConfigError, before anything is computed, unless the answer can be written to ``path``."""
    if path is not None and path != STDOUT and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ConfigError(f"{flag} {path}: name a file in a folder that exists, or - for standard output.")


@contextlib.contextmanager
def answering(path: Path | None) -> Iterator[None]:
    """Around a verb with ``--json path``: with ``-``, all that is printed goes to stderr, except the answer."""
    check_answer(path)
    if path != STDOUT:
        yield
        return
    before = ANSWERS.set(sys.stdout)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        ANSWERS.reset(before)


def write_answer(path: Path | None, answer: Any) -> None:
    """Writes the answer; a number that is not finite becomes null. None writes nothing."""
    if path is None:
        return
    text = json.dumps(_finite(answer), indent=2, allow_nan=False)
    if path == STDOUT:
        print(text, file=ANSWERS.get(), flush=True)
    else:
        from selectkd.data.durable import write_plain

        write_plain(path, (text + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
