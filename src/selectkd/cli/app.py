"""The verbs together, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from selectkd import __version__
from selectkd.cli import (
    cache,
    cut,
    data,
    demo,
    doctor,
    env,
    estimate,
    eval,
    export,
    generate,
    init,
    push,
    report,
    schema,
    serve,
    show,
    study,
    teacher,
    train,
    watch,
)
from selectkd.cli.overrides import OfRecipe
from selectkd.cli.terminal import be_quiet, say, show_error, without_others
from selectkd.cli.threads import settle_threads
from selectkd.cli.verb import Debug, Quiet, Verb
from selectkd.errors import ResourceError, SelectKDError

INTERRUPTED = 130
USAGE = 2

ORDER = (
    *("demo", "init", "data", "doctor", "estimate", "cut", "generate", "cache", "train"),
    *("watch", "runs", "eval", "report", "export", "push"),
    *("serve-teacher", "teacher", "study", "show", "schema", "env", "version"),
)
"""Verbs in the order of a first project, as `selectkd --help` lists them; what is hidden comes after them."""


class InOrder(TyperGroup):
    """The group of all verbs, in ORDER."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The names of all verbs."""
        return sorted(super().list_commands(ctx), key=(*ORDER, *study.VERBS).index)


app = typer.Typer(
    name="selectkd",
    cls=InOrder,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Distil a large language model into a small one.",
    epilog="Exit codes: 0 success, 2 usage or recipe, 3 data, 4 teacher, 5 integrity, 6 numbers, 7 resources. "
    "75: preempted; 130: interrupted. In both cases training can be resumed.",
)
app.command("demo", cls=OfRecipe)(demo.demo)
app.command("init", cls=Verb)(init.init)
app.add_typer(data.app, name="data")
app.command("doctor", cls=OfRecipe)(doctor.doctor)
app.command("estimate", cls=OfRecipe)(estimate.estimate)
app.command("cut", cls=OfRecipe)(cut.cut)
app.command("generate", cls=OfRecipe)(generate.generate)
app.add_typer(cache.app, name="cache")
app.command("train", cls=OfRecipe)(train.train)
app.command("eval", cls=Verb)(eval.evaluate)
app.command("watch", cls=Verb)(watch.watch)
app.command("runs", cls=Verb)(watch.runs)
app.command("report", cls=Verb)(report.report)
app.command("export", cls=Verb)(export.export)
app.command("push", cls=Verb)(push.push)
app.command("serve-teacher", cls=Verb)(serve.serve_teacher)
app.add_typer(teacher.app, name="teacher")
app.add_typer(study.app, name="study")
app.command("show", cls=Verb)(show.show)
app.command("schema", cls=Verb)(schema.schema)
app.command("env", cls=Verb)(env.env)
for _name, (_class, _function) in study.VERBS.items():  # their names before there was a group
    app.command(_name, cls=_class, hidden=True)(_function)


@app.command("version", cls=Verb)
def version() -> None:
    """Print the version."""
    say(__version__)


WrongUsage: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")
"""What typer raises for a wrong command line, wherever this version of it takes that from."""


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
    debug: Debug = False,
    quiet: Quiet = False,
) -> None:
    """Distil a large language model into a small one."""
    if version:
        say(__version__)
        raise typer.Exit(0)
    if context.invoked_subcommand is None:
        say(context.get_help())
        raise typer.Exit(USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns its exit code; an error is at most six lines on stderr."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if sys.platform == "win32":
        show_error(
            "error: selectkd runs on Linux and macOS. On Windows use WSL 2: https://learn.microsoft.com/windows/wsl"
        )
        return USAGE
    debug = "--debug" in given
    be_quiet("--quiet" in given)
    settle_threads()
    if arguments is None and not debug:
        without_others()
    try:
        code = app(given, standalone_mode=False, prog_name="selectkd")
    except KeyboardInterrupt:
        show_error("interrupted.")
        return INTERRUPTED
    except typer.Abort:
        show_error("interrupted.")
        return INTERRUPTED
    except typer.Exit as stop:
        return stop.exit_code
    except WrongUsage as error:
        show_error(f"error: {error.format_message()}\nTry `selectkd --help`.")  # type: ignore[attr-defined]
        return USAGE
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read stdout has gone
        return 1
    except SelectKDError as error:
        if debug:
            raise
        show_error(f"error: {error}")
        return error.exit_code
    except MemoryError:
        if debug:
            raise
        show_error("error: out of memory. A smaller training.batch_size or training.chunk needs less.")
        return ResourceError.exit_code
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if debug or (error.filename is None and not full):
            raise
        if full:
            from selectkd.data.durable import disk_error

            show_error(f"error: {disk_error(error, Path(error.filename or '.').absolute())}")
        else:
            show_error(f"error: {error.filename or 'writing'}: {error.strerror}.")
        return ResourceError.exit_code if full else USAGE
    if code == INTERRUPTED:  # what typer makes of a KeyboardInterrupt
        show_error("interrupted.")
    return code if isinstance(code, int) else 0
