"""``selectkd teacher doctor URL``: what a server does with our questions, and how to start it so that it can teach."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.options import ApiKeyEnv
from selectkd.cli.terminal import say
from selectkd.cli.verb import Verb
from selectkd.errors import TeacherError

if TYPE_CHECKING:
    from selectkd.teachers.remote.own import OwnServer

app = typer.Typer(
    no_args_is_help=False, pretty_exceptions_enable=False, help="Check a server that a teacher runs on."
)

ORDINARY = 1000
"""Ids below this are tokens of every vocabulary there is; those of one that is named may be fewer."""

WIDEST = 1 << 20
"""No vocabulary is wider."""


@app.callback()
def teacher() -> None:
    """Check a server that a teacher runs on."""


@app.command("doctor", cls=Verb)
def doctor(
    url: Annotated[str, typer.Argument(help="The address of the server: http://HOST:PORT")],
    kind: Annotated[
        str | None, typer.Option(help="vllm, sglang, openai or selectkd. Default: detected.")
    ] = None,
    k: Annotated[int, typer.Option(min=1, help="The number of best tokens wanted at each position.")] = 32,
    model: Annotated[str | None, typer.Option(help="The model's name on the server.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The server's tokenizer: a folder or a model on the hub.")
    ] = None,
    api_key_env: ApiKeyEnv = None,
    ca: Annotated[
        str | None, typer.Option(help="The authority of the server's certificate, as a PEM file.")
    ] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 60.0,
    json_file: JsonFile = None,
) -> None:
    """Check whether a server can act as a teacher.

    It prints the flags to start the server with. The exit code is 4 if it cannot teach as it is.
    """
    from pydantic import ValidationError

    from selectkd.config import RemoteTeacher
    from selectkd.config.problems import Problem, explained, raised

    keys = {"url": url, "kind": kind or "openai", "k": k, "tokenizer": tokenizer or "unknown", "model": model,
            "api_key_env": api_key_env, "ca": ca, "timeout": timeout, "wait": 0.0, "retries": 0}  # fmt: skip
    try:
        section = RemoteTeacher.model_validate(keys)
    except ValidationError as error:
        wrong = explained(error, RemoteTeacher, keys)
        raise raised(
            [Problem(path, "selectkd teacher doctor", message) for path, message in wrong], url
        ) from None

    from selectkd.models.load import load_tokenizer
    from selectkd.teachers.remote.own import OwnServer
    from selectkd.teachers.remote.plan import connection_of
    from selectkd.teachers.remote.probe import PROBED, UNSTEADY, examine, kind_of
    from selectkd.teachers.remote.server import TopKServer
    from selectkd.teachers.remote.settings import DOCTOR

    connection = connection_of(section, DOCTOR)
    kind = kind or kind_of(connection)
    if kind == "selectkd":
        _own(OwnServer(connection), json_file)
        return
    vocabulary = WIDEST
    if tokenizer is not None:
        vocabulary = max(load_tokenizer(tokenizer).get_vocab().values()) + 1
    prompt = [1 + at * 7919 % (min(vocabulary, ORDINARY) - 1) for at in range(PROBED)]
    found = examine(TopKServer(connection, kind, k, vocabulary, model), prompt)
    connection.close()
    able = found.most is not None and found.most >= k and max(found.repeated, found.prefix) <= UNSTEADY
    write_answer(json_file, {**asdict(found), "able": able})
    length = "" if found.max_length is None else f", up to {found.max_length:,} tokens"
    most = "as many as there are" if found.most == vocabulary else f"{found.most} at most"
    say(f"{found.url}: {found.kind}, model {found.model}{length}")
    say(f"  best tokens a position: {most}" + (", and the text's own beside them" if found.extra else ""))
    say(f"  log-probabilities: {'processed' if found.processed else 'raw'}")
    say(f"  one prompt asked twice: {found.repeated:.3g} nats apart; begun alike: {found.prefix:.3g}")
    say(f"  prompts with images: {found.images or 'taken, where its model sees images'}")
    if found.wrong:
        for problem in found.wrong:
            say(f"  {problem}")
        say(
            f"  start it with: {' '.join(found.flags)}"
            if found.flags
            else "  no flag of this kind of server fixes that"
        )
    if not able:
        raise TeacherError(f"{found.url} cannot teach with k = {k} as it is: {'; '.join(found.wrong)}.")


def _own(server: OwnServer, json_file: Path | None) -> None:
    """Our own server says what it gives; its head is fetched, which shows that it does."""
    from selectkd.teachers.remote.probe import ALONE

    about = server.about
    server.head()
    server.connection.close()
    write_answer(json_file, {"url": server.connection.url, "kind": "selectkd", **about, "able": True})
    length = "" if about["max_length"] is None else f", up to {about['max_length']:,} tokens"
    say(f"{server.connection.url}: selectkd, model {about['model']} in {about['dtype']}{length}")
    say(f"  hidden states of width {about['width']} and their head, or as many best tokens as there are")
    say(f"  prompts with images: {ALONE.format(kind='selectkd')}")
    say(f"  prompts with images: {ALONE.format(kind='selectkd')}")
