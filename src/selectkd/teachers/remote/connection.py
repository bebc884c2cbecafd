"""One server over HTTP: deadlines, limits, patience, and a key that goes nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NoReturn, TypeVar

import httpx2
from httpx2 import HTTPError, InvalidURL, TransportError

from selectkd.errors import TeacherError
from selectkd.teachers.remote.answers import WrongAnswer, stated_limit
from selectkd.teachers.remote.secrets import without_key, without_key_bytes
from selectkd.teachers.remote.settings import TEACHER, Settings
from selectkd.teachers.remote.tls import certificate_error, trust

T = TypeVar("T")

SMALL = 1 << 20
"""Bytes of a refusal, a list of models or a description: more is never read of them."""

FIRST_PAUSE, LONGEST_PAUSE = 0.1, 5.0
"""Seconds between two attempts: doubled from the first to the longest."""

_ADVICE = "; `selectkd teacher doctor` says what is amiss"

BUSY = (429, 503)
AWAY = (408, 500, 502, 504)


@dataclass(frozen=True)
class Reply:
    """A whole answer with a status of 200: its headers, names in lower case, and its bytes."""

    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Question(Generic[T]):
    """A request, the most bytes of its answer, and the parser of the answer; ``read`` raises WrongAnswer.

    content None: a GET, else a POST of JSON. what: the answer in words, for errors. needs: what the server must have
    or be started with to answer, for errors that say it has not.
    """

    path: str
    content: bytes | None
    cap: int
    read: Callable[[Reply], T]
    what: str = "the teacher's rows"
    needs: str = ""


class TooMany(TeacherError):
    """More log-probabilities a token were asked for than the server gives, ``most``."""

    def __init__(self, message: str, most: int) -> None:
        super().__init__(message)
        self.most = most


class NotThere(TeacherError):
    """The server has no such path (status 404)."""


class _Away(Exception):
    """No answer, or one that says to come back: after ``pause`` seconds where the server says when."""

    def __init__(self, reason: str, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


@dataclass
class Connection:
    """A server at ``url`` (with or without its /v1) and the patience for it.

    An attempt ends ``timeout`` seconds after it began, wherever it hangs. A server that is away, busy or stalled is
    asked again, as it says or ever less often, until ``wait`` seconds after the first attempt that failed had ended; an
    answer that is wrong, ``retries`` times. Then, and at once where asking again cannot help, TeacherError. No redirect
    is followed, no proxy or cookie of the environment used, no compressed body read. ca: the file with the authority a
    certificate must be from. settings: what all of this is called where the user set it. transport: what carries the
    requests, where that is not the network.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    wait: float = 60.0
    retries: int = 3
    concurrency: int = 8
    ca: str | None = None
    settings: Settings = TEACHER
    transport: httpx2.AsyncBaseTransport | None = field(default=None, repr=False)
    met: int = field(default=0, init=False)
    """Grows whenever the other end may be another process: a new connection, or one that gave no answer."""
    _line: _Line | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1").rstrip("/")
        secure = self.url.lower().startswith("https:")
        self._trust: Any = trust(self.ca, self.settings.ca) if secure else False

    def ask(self, questions: Sequence[Question[T]]) -> list[T]:
        """The answers in order, ``concurrency`` questions under way at once; TeacherError where one has none.

        Then no attempt begins any more, and those under way are read to their end: a question may keep what it read.
        """
        return self._run(self._all(questions))

    def close(self) -> None:
        """Ends the connections; the next question opens new ones."""
        if self._line is not None:
            self._line.closed()
        self._line = None

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._open().loop)
        try:
            return future.result()
        finally:
            future.cancel()  # of an interrupted caller

    def _open(self) -> _Line:
        if self._line is None:
            client = httpx2.AsyncClient(
                base_url=self.url,
                transport=self.transport,
                verify=self._trust,
                timeout=None,  # the deadline is on the whole attempt
                follow_redirects=False,
                trust_env=False,
                limits=httpx2.Limits(max_connections=self.concurrency),
                headers={"accept-encoding": "identity", "user-agent": "selectkd"},
            )
            self._line = _Line(client)
            self._line.closed = weakref.finalize(self, _end, self._line.loop, client, self._line.thread)
        return self._line

    async def _all(self, questions: Sequence[Question[T]]) -> list[T]:
        turn, failed = asyncio.Semaphore(self.concurrency), asyncio.Event()
        tasks = [asyncio.ensure_future(self._in_turn(question, turn, failed)) for question in questions]
        try:
            return list(await asyncio.gather(*tasks))
        except TeacherError:
            await asyncio.wait(tasks)
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _in_turn(self, question: Question[T], turn: asyncio.Semaphore, failed: asyncio.Event) -> T:
        async with turn:
            if failed.is_set():
                raise asyncio.CancelledError
            try:
                return await self._answer(question, failed)
            except TeacherError:
                failed.set()
                raise

    async def _answer(self, question: Question[T], failed: asyncio.Event) -> T:
        wrong, pause, away_since = 0, FIRST_PAUSE, None
        began = time.monotonic()
        while True:
            try:
                reply = await self._attempt(question)
                return question.read(reply)
            except WrongAnswer as error:
                wrong, away_since, began = wrong + 1, None, time.monotonic()
                if wrong > self.retries:
                    raise TeacherError(
                        f"{self.url} answered wrong {wrong} times ({question.what}); the last error: "
                        f"{self._safe(str(error))}. No such answer was used"
                        f"{_ADVICE if self.settings is TEACHER else ''}."
                    ) from error
            except _Away as error:
                self.met += 1
                now = time.monotonic()
                first = away_since is None
                away_since = now if away_since is None else away_since
                next_in = pause if error.pause is None else error.pause
                if next_in > away_since + self.wait - now:
                    hint = "" if error.pause is None else f" and asks to come back in {error.pause:.0f} s"
                    longer = f", or wait longer for it: {self.settings.wait}, now {self.wait:g} s"
                    raise TeacherError(
                        f"{self.url} did not answer for {now - began:.0f} s ({error}){hint}. "
                        f"Start it{longer if self.settings.wait else ' and ask again'}."
                    ) from error
                if first:
                    logging.getLogger("selectkd").warning(
                        "%s does not answer (%s); waiting up to %g s", self.url, error, self.wait
                    )
                await _rest(next_in, failed)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            await _rest(FIRST_PAUSE, failed)

    async def _attempt(self, question: Question[Any]) -> Reply:
        try:
            return await asyncio.wait_for(self._exchange(question), self.timeout)
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise _Away(f"not whole after {self.timeout:g} s") from error
        except TransportError as error:
            certificate = certificate_error(error)
            if certificate is not None:
                raise TeacherError(
                    f"{self.url} has a certificate that cannot be verified: {certificate}. Nothing was sent. Use the "
                    "host name in its certificate, or name the file with its authority's certificate: "
                    f"{self.settings.ca or 'the variable SSL_CERT_FILE'}."
                ) from error
            raise _Away(f"{type(error).__name__}: {self._safe(str(error))}".rstrip(": ")) from error
        except (HTTPError, InvalidURL) as error:
            raise TeacherError(f"{self.url}: {type(error).__name__}: {self._safe(str(error))}.") from error

    async def _exchange(self, question: Question[Any]) -> Reply:
        client = self._open().client
        headers = {"content-type": "application/json"} if question.content is not None else {}
        if self.key is not None:
            headers["authorization"] = f"Bearer {self.key}"
        method = "GET" if question.content is None else "POST"
        request = client.build_request(
            method,
            question.path,
            content=question.content,
            headers=headers,
            extensions={"trace": self._traced},
        )
        response = await client.send(request, stream=True)
        try:
            good = response.status_code == 200
            encoding = response.headers.get("content-encoding", "identity")
            if good and encoding.strip().lower() not in ("", "identity"):
                raise WrongAnswer(
                    f"a body in {self._safe(encoding)[:20]!r}, though none was to be compressed"
                )
            cap = question.cap if good else SMALL
            length = response.headers.get("content-length", "0")
            if good and length.isdigit() and int(length[:20]) > cap:
                raise WrongAnswer(f"a body of {int(length[:20]):,} bytes where {cap:,} are the most")
            body = bytearray()
            async for part in response.aiter_raw():
                body += part
                if len(body) > cap:
                    if good:
                        raise WrongAnswer(f"a body of more than the {cap:,} bytes it can have")
                    break
            fields = {name.lower(): self._safe(value) for name, value in response.headers.items()}
            clean = without_key_bytes(bytes(body), self.key)  # before any of it is cut
            if good:
                return Reply(fields, clean)
            self._refused(response.status_code, fields, clean[:SMALL], question)
        finally:
            with contextlib.suppress(TransportError):
                await response.aclose()

    async def _traced(self, event: str, info: Mapping[str, Any]) -> None:
        """Hears of what a request does, from the library."""
        if event == "connection.connect_tcp.complete":
            self.met += 1

    def _refused(
        self, status: int, headers: Mapping[str, str], body: bytes, question: Question[Any]
    ) -> NoReturn:
        """Raises what a status other than 200 means."""
        words = self._safe(body[:2000].decode("utf-8", "replace"))
        words = " ".join("".join(c if c.isprintable() else " " for c in words).split())[:300]
        reason = f" It says: {words}" if words else ""
        if status == 403 and "--" in words:  # a flag of the server, not a key
            raise TeacherError(f"{self.url}{question.path} is switched off (status 403).{reason}")
        if status in BUSY:
            raise _Away(f"status {status}", _retry_after(headers.get("retry-after")))
        if status in AWAY:
            raise _Away(f"status {status}" + (f": {words[:120]}" if words else ""))
        if status in (401, 403):
            what = "refuses the key" if self.key is not None else "wants a key"
            raise TeacherError(
                f"{self.url} {what} (status {status}). Put the key into a variable of the environment and name it: "
                f"{self.settings.key}."
            )
        if 300 <= status < 400:
            raise TeacherError(
                f"{self.url}{question.path} redirects to another address (status {status}). Redirects are not "
                "followed, since the key would be sent there. If you trust that address, name it as "
                f"{self.settings.url}."
            )
        if status == 404:
            raise NotThere(
                f"{self.url}{question.path} is not there (status 404): a server of another kind, or "
                f"{self.settings.model} is a name it does not serve.{reason} {question.needs}".rstrip()
            )
        limit = stated_limit(words)
        if limit is not None:
            wanted, most = limit
            k = self.settings.k or "k"
            raise TooMany(
                f"{self.url} gives at most {most} log-probabilities a token, and {k} = {wanted}. Start it with "
                f"`--max-logprobs {wanted}`, or set {k} to {most} or less.",
                most,
            )
        raise TeacherError(f"{self.url}{question.path} refused the request (status {status}).{reason}")

    def _safe(self, text: str) -> str:
        """``text`` without the key or a part of it, should a server or library repeat it."""
        return without_key(text, self.key)


class _Line:
    """The open connections to a server, and the event loop they live in, which runs in a thread of its own.

    So connections outlive a call, and a caller whose thread has a running loop (a notebook) can ask too. The thread is
    a daemon, so that it never holds up the end of the process.
    """

    closed: Callable[[], Any]

    def __init__(self, client: httpx2.AsyncClient) -> None:
        self.client, self.loop = client, asyncio.new_event_loop()
        self.thread = threading.Thread(target=_serve, args=(self.loop,), name="selectkd teacher", daemon=True)
        self.thread.start()


async def _rest(seconds: float, failed: asyncio.Event) -> None:
    """Sleeps between two attempts; ends the question where another one has failed meanwhile."""
    with contextlib.suppress(asyncio.TimeoutError, TimeoutError):
        await asyncio.wait_for(failed.wait(), seconds)
        raise asyncio.CancelledError


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
    finally:
        loop.close()


def _end(loop: asyncio.AbstractEventLoop, client: httpx2.AsyncClient, thread: threading.Thread) -> None:
    """Ends a line, called when its connection is closed or collected, from whatever thread that happens in."""

    async def last() -> None:
        await client.aclose()
        loop.stop()

    asyncio.run_coroutine_threadsafe(last(), loop)
    if thread is not threading.current_thread():
        thread.join(5.0)


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given as a number or as a date; None where there is none to be read."""
    if value is None:
        return None
    if value.strip().isdigit():
        return float(value.strip()[:9])
    try:
        until = parsedate_to_datetime(value)
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=timezone.utc)
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())
