"""A server's behaviour, found by test questions before anything is trained on its answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from selectkd.data.example import Example
from selectkd.errors import TeacherError
from selectkd.teachers.remote.answers import TopK, TopKRequest, json_object
from selectkd.teachers.remote.connection import SMALL, Connection, NotThere, Question, TooMany
from selectkd.teachers.remote.fingerprint import difference
from selectkd.teachers.remote.sample import Sample, with_images
from selectkd.teachers.remote.server import TopKServer
from selectkd.teachers.remote.wire import TEACHER

STEADY = 0.02
"""Nats that one log-probability may differ between two answers without a warning: bf16 rounds about so much."""

UNSTEADY = 0.5
"""Nats at which a run is refused: no rounding moves a best token so far, stale memory does."""

PROBED = 64
"""Tokens of the test prompt: four of vLLM's blocks of 16, which a prefix cache can find again."""


SHOWN = 8
"""Samples with images that are asked about before a run; every later one is checked as it is asked about."""
ALONE = "kind {kind} gets token ids alone"
"""Why a kind of server takes no prompts with images."""


@dataclass(frozen=True)
class Findings:
    """What was found. extra: whether a position can hold K + 1 entries, the text's own token among them.

    processed: whether the sampling temperature moves the log-probabilities. repeated, prefix: the most nats by which a
    log-probability differed when the same prompt, and one that begins like it, was asked. most: the most best tokens
    the server gives, None where that was not looked for. images: why prompts with images are not taken, empty where
    they are, None where that was not looked for. wrong: in words; flags: what to start it with.
    """

    url: str
    kind: str
    model: str
    max_length: int | None
    k: int
    extra: bool
    processed: bool
    repeated: float
    prefix: float
    most: int | None = None
    images: str | None = None
    wrong: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)


def probe(server: TopKServer, ids: Sequence[int]) -> Findings:
    """Asks the same prompt twice, one that begins like it, and the first at another temperature.

    ids: a prompt of this text; its first 64 tokens are used. TeacherError where the server cannot be asked at all.
    """
    ids = list(ids[:PROBED])
    if len(ids) < 2:
        raise TeacherError(f"{server.connection.url} cannot be probed with {len(ids)} tokens; it takes 2.")
    served = server.served()
    server = replace(server, model=served.name)
    request = server.request(ids, list(range(len(ids) - 1)))
    # one after the other: what the first leaves in a prefix cache is what the next might be given
    [first] = server.connection.ask([server.question(request)])
    [again] = server.connection.ask([server.question(request)])
    cut = max(2, len(ids) // 2)
    other = [*ids[:cut], *reversed(ids[:cut])]
    turned = server.request(other, list(range(cut - 1)))
    [shared] = server.connection.ask([server.question(turned)])
    [heated] = server.connection.ask([server.question(request, temperature=2.0)])
    [most] = server.connection.ask([entries_of(server, request)])
    start = TopK(first.ids[: cut - 1], first.logp[: cut - 1])
    found = Findings(
        server.connection.url,
        server.kind,
        served.name,
        served.max_length,
        server.k,
        extra=most > server.k,
        processed=min(difference(first, heated), difference(again, heated)) > UNSTEADY,
        repeated=difference(first, again),
        prefix=difference(start, shared),
    )
    return with_cures(found, dict(server.dialect.flags))


def read_alike(server: TopKServer, examples: Sequence[Example]) -> None:
    """TeacherError, naming the record, where a server reads one of the first samples with images as other tokens."""
    for example in islice(with_images(examples), SHOWN):
        try:
            server.top_k([Sample(example.input_ids, [len(example) - 2], example.images)])
        except TeacherError as error:
            raise TeacherError(f"{example.origin}: {error}") from error


def examine(server: TopKServer, ids: Sequence[int]) -> Findings:
    """``probe`` at the wanted K, or at the most the server gives, which is looked for. TeacherError, with every flag
    that could cure it, where the answers cannot be read.
    """
    server = replace(server, model=server.served().name)
    try:
        most = largest_k(server, ids)
        if most < 1:
            raise TeacherError(f"{server.connection.url} gives no log-probabilities of a prompt's tokens.")
        found = probe(replace(server, k=min(server.k, most)), ids)
    except (TooMany, NotThere):
        raise
    except TeacherError as error:
        flags = " ".join(flag.format(k=server.k) for _, flag in server.dialect.flags)
        raise TeacherError(f"{error} Start it with: {flags}" if flags else str(error)) from error
    found = replace(found, k=server.k, most=most, images=no_images(server))
    return with_cures(found, dict(server.dialect.flags))


def no_images(server: TopKServer) -> str:
    """Why a server takes no prompts with images; empty where it has the path for them."""
    dialect = server.dialect.with_images
    if dialect is None:
        return ALONE.format(kind=server.kind)
    content = {"token_ids": [1], "sampling_params": {"max_tokens": 1}, "model": server.model}
    question = Question(
        dialect.path, json.dumps(content).encode(), SMALL, lambda reply: None, needs=dialect.needs
    )
    try:
        server.connection.ask([question])
    except TeacherError as error:
        return str(error)
    return ""


def kind_of(connection: Connection) -> str:
    """Which kind of server answers, by the paths that only one of them has; openai where none of them is there."""
    for path, kind in ((TEACHER, "selectkd"), ("/get_model_info", "sglang"), ("/version", "vllm")):
        try:
            connection.ask(
                [Question(path, None, SMALL, lambda reply: json_object(reply.body), f"its {path}")]
            )
        except NotThere:
            continue
        return kind
    return "openai"


def entries_of(server: TopKServer, request: TopKRequest) -> Question[int]:
    """A question whose answer is the most entries of a position, whatever they are."""
    whole, entries = server.question(request), server.dialect.entries
    return Question(whole.path, whole.content, whole.cap, lambda reply: entries(reply.body))


def with_cures(found: Findings, flags: dict[str, str]) -> Findings:
    """The findings with their faults in words and the flags that cure them."""
    wrong: list[str] = []
    cures: list[str] = []
    if found.most is not None and found.most < found.k:
        wrong.append(f"it gives {found.most} best tokens at most, and {found.k} are wanted")
        cures.append("limit")
    if found.processed:
        wrong.append(
            "its log-probabilities follow the sampling temperature: they are processed. They are asked for at "
            "temperature 1 and without penalties, which leaves them the model's own"
        )
        cures.append("mode")
    if max(found.repeated, found.prefix) > STEADY:
        wrong.append(
            f"one prompt gets different answers: {found.repeated:.3g} nats apart when repeated, {found.prefix:.3g} "
            "where two prompts begin alike"
        )
        cures.append("prefix")
    needed = [flags[cure].format(k=found.k) for cure in cures if cure in flags]
    return replace(found, wrong=wrong, flags=needed)


def largest_k(server: TopKServer, ids: Sequence[int]) -> int:
    """The most best tokens the server gives, at most its vocabulary: what it says when asked for more, or bisected."""
    low, high = 0, server.vocabulary
    guess = high
    while low < high:
        request = TopKRequest(list(ids[:2]), [0], guess, server.vocabulary)
        try:
            [got] = server.connection.ask([entries_of(server, request)])
        except TooMany as error:
            high = max(0, min(error.most, guess - 1))
            guess = high
            continue
        except TeacherError:  # refused without a number
            high = guess - 1
        else:
            low, high = (guess, high) if got >= guess else (low, min(got, guess - 1))
        guess = (low + high + 1) // 2
    return low
