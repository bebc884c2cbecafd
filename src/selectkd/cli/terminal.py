"""What reaches the terminal: text with control characters made visible, whatever a file or model wrote."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from selectkd.report.escapes import clean

if TYPE_CHECKING:
    from rich.console import Console

MOST_LINES = 6
PROGRESS = logging.getLogger("selectkd.progress")
"""Its level is what --quiet sets."""

RESET = "\x1b[0m"
MARKS = {"": ("", ""), "trained": ("[[", "]]"), "image": ("<<", ">>")}
COLOURS = {"": ("", ""), "trained": ("\x1b[32m", RESET), "image": ("\x1b[36m", RESET)}
"""Around a piece of a sample by its kind, in a file and on a terminal."""


def say(text: object = "") -> None:
    """One message on stdout, cleaned."""
    print(_encodable(clean(text), sys.stdout), flush=True)


def show_progress(text: object) -> None:
    """One line on stderr of what is going on, unless --quiet was given."""
    if PROGRESS.isEnabledFor(logging.INFO):
        show_error(text)


def be_quiet(quiet: bool) -> None:
    """Whether progress is left out from now on."""
    PROGRESS.setLevel(logging.WARNING if quiet else logging.INFO)


def progress_console() -> Console:
    """Where a progress bar is drawn: stderr, or nowhere after --quiet."""
    from rich.console import Console

    return Console(stderr=True, quiet=not PROGRESS.isEnabledFor(logging.INFO))


def show_error(text: object) -> None:
    """One message on stderr, cleaned and at most six lines long."""
    lines = clean(text).splitlines() or [""]
    if len(lines) > MOST_LINES:
        left = len(lines) - MOST_LINES + 1
        lines = [*lines[: MOST_LINES - 1], f"... and {left} more lines; --debug shows them."]
    print(_encodable("\n".join(lines), sys.stderr), file=sys.stderr, flush=True)


def coloured(stream: object = None) -> bool:
    """Whether colour is wanted: a terminal, and NO_COLOR unset."""
    stream = sys.stdout if stream is None else stream
    return bool(getattr(stream, "isatty", lambda: False)()) and "NO_COLOR" not in os.environ


def paint(pieces: Sequence[tuple[str, str]]) -> str:
    """Text in pieces (text, kind): on a terminal what is trained on is green and what stands for an image cyan;
    elsewhere they are between [[ and ]], and between << and >>."""
    marks = COLOURS if coloured() else MARKS
    return "".join(marks[kind][0] + clean(text) + marks[kind][1] for text, kind in pieces)


def write(text: str) -> None:
    """Text that has been cleaned already and carries our own colours."""
    print(_encodable(text, sys.stdout), flush=True)


class WarningLines(logging.Handler):
    """Warnings of the library, on stderr as the command line's own."""

    def emit(self, record: logging.LogRecord) -> None:
        show_error(f"{record.levelname.lower()}: {record.getMessage()}")


def _encodable(text: str, stream: object) -> str:
    """``text`` with what the stream's encoding lacks as escapes."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def without_others() -> None:
    """Before a library loads: no progress bars and no warnings of libraries among our lines, unless the user asked for
    them by the libraries' own variables.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault(
        "TQDM_DISABLE", "1"
    )  # the bar of a GGUF file's conversion, which has no other switch
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def without_other_bars() -> None:
    """No progress bars of transformers between ours: loading and saving a model each draw one."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
