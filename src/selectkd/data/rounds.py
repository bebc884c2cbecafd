"""Many records at once: what each asks for on its way, renderings and tokens, is answered for all of them together.

The way of a record is a generator. It yields what it needs, is sent the answer, and returns its result; so it reads
like the way of one record alone.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from selectkd.data.encoding import Encoded
from selectkd.data.prompts import packed_keys
from selectkd.data.renderer import Answer, Renderings
from selectkd.errors import DataError

T = TypeVar("T")


class Tokens(NamedTuple):
    """Asks for the tokens of a text: an ``Encoded``."""

    text: str


class Keys(NamedTuple):
    """Asks for the keys of a prompt: see ``prompts.packed_keys``."""

    text: str


Ask = Renderings | Tokens | Keys
Steps = Generator[Ask, Any, T]
"""The way of one record to a T."""


def together(
    work: Sequence[Steps[T]],
    render: Callable[[Sequence[Renderings]], Iterable[list[Answer]]],
    encode: Callable[[Sequence[str]], Iterable[Encoded]],
    *,
    until_error: bool = False,
) -> list[T | DataError]:
    """The result of each record, or the error that its way raised; ``until_error``: up to the first error.

    render: the texts of some records' jobs, each record's when it is wanted. encode: the tokens of some texts.
    """
    results: list[Any] = [None] * len(work)
    asks: dict[int, Ask] = {}
    end = len(work)

    def send(index: int, answer: Any) -> None:
        nonlocal end
        if index >= end:
            return
        try:
            asks[index] = work[index].send(answer)
        except StopIteration as done:
            results[index] = done.value
        except DataError as error:
            results[index] = error
            end = index + 1 if until_error else end

    for index in range(len(work)):
        send(index, None)
    while now := {index: asks.pop(index) for index in sorted(asks) if index < end}:
        asks.clear()
        texts = {index: ask for index, ask in now.items() if isinstance(ask, Renderings)}
        tokens = {index: ask.text for index, ask in now.items() if isinstance(ask, Tokens)}
        prompts = {index: ask.text for index, ask in now.items() if isinstance(ask, Keys)}
        for wanted, answers in (
            (prompts, packed_keys(list(prompts.values()))),
            (texts, render(list(texts.values())) if texts else ()),
            (tokens, encode(list(tokens.values())) if tokens else ()),
        ):
            found = iter(answers)
            for index in wanted:
                if index < end:  # what comes behind an error is not rendered any more
                    send(index, next(found))
    return results[:end]


def alone(
    steps: Steps[T],
    render: Callable[[Sequence[Renderings]], Iterable[list[Answer]]],
    encode: Callable[[Sequence[str]], Iterable[Encoded]] = lambda _: (),
) -> T:
    """The result of one record. Raises the error of its way."""
    (found,) = together([steps], render, encode)
    if isinstance(found, DataError):
        raise found
    return found
