"""The routes of a server, and who may use them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import AsyncIterator
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from selectkd.teachers.remote.wire import HEAD, ROWS, TEACHER, answer_bytes
from selectkd.teachers.server.engine import Engine
from selectkd.teachers.server.request import Refused, parse

BLOCK = 1 << 20
"""Bytes of the head that are handed over at once, so that a slow reader holds no more."""

LOCAL = ("127.0.0.1", "localhost", "[::1]")


def application(engine: Engine, *, token: str | None, hosts: tuple[str, ...] = LOCAL) -> ASGIApp:
    """The app. token: what every request must bear, whatever its path; None: none. hosts: names it may be called by
    where there is no token, so that a page in a browser cannot reach it under a name of its own.
    """

    async def teacher(request: Request) -> Response:
        return JSONResponse(engine.about)

    async def head(request: Request) -> Response:
        async def blocks() -> AsyncIterator[bytes]:
            for start in range(0, len(engine.head_bytes), BLOCK):
                yield engine.head_bytes[start : start + BLOCK]

        size = {"content-length": str(len(engine.head_bytes))}
        return StreamingResponse(blocks(), media_type="application/octet-stream", headers=size)

    async def rows(request: Request) -> Response:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise Refused(415, "the body must be application/json")
        question = await _body(request, engine)
        about = engine.about
        wanted = parse(
            question,
            engine.limits,
            vocabulary=about["vocabulary"],
            max_length=engine.max_length,
            width=about["width"],
        )
        tensors = await engine.rows(wanted)
        answer = await asyncio.to_thread(answer_bytes, tensors, question=question, weights=engine.weights)
        return Response(answer, media_type="application/octet-stream")

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)  # the one that is registered
        later = {"retry-after": "1"} if error.status == 503 else {}
        # the rest of a body that was not read would be taken for the next request
        closing = {"connection": "close"} if error.status in (408, 413, 415) else {}
        return JSONResponse({"error": str(error)}, error.status, headers={**later, **closing})

    async def vanished(request: Request, error: Exception) -> Response:
        return Response(status_code=400)  # nobody reads it

    routes = [Route(TEACHER, teacher), Route(HEAD, head), Route(ROWS, rows, methods=["POST"])]
    handlers: dict[Any, Any] = {Refused: refused, ClientDisconnect: vanished}
    return _Door(Starlette(routes=routes, exception_handlers=handlers), token, hosts)


class _Door:
    """Lets a request through that bears the token or, where there is none, calls the server by a name of its own."""

    def __init__(self, app: ASGIApp, token: str | None, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts
        self.expected = None if token is None else _hash(f"Bearer {token}".encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            fields = dict(scope["headers"])
            if self.expected is not None:
                # equal lengths in equal time, whatever was sent
                if not hmac.compare_digest(_hash(fields.get(b"authorization", b"")), self.expected):
                    answer = JSONResponse(
                        {"error": "the token is missing or wrong"},
                        401,
                        headers={"www-authenticate": "Bearer", "connection": "close"},
                    )
                    await answer(scope, receive, send)
                    return
            elif _name(fields.get(b"host", b"").decode("latin-1")) not in self.hosts:
                await JSONResponse({"error": "this server has another name"}, 421)(scope, receive, send)
                return
        elif scope["type"] != "lifespan":
            return  # no websocket is spoken here
        await self.app(scope, receive, send)


async def _body(request: Request, engine: Engine) -> bytes:
    """The body, within its size and its time; Refused with 413 or 408."""
    limit = engine.limits.body
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length[:20]) > limit:
        raise Refused(413, f"a body of {length[:20]} bytes; {limit:,} are the most")
    body = bytearray()

    async def read() -> None:
        async for part in request.stream():
            body.extend(part)
            if len(body) > limit:
                raise Refused(413, f"a body of more than {limit:,} bytes")

    try:
        await asyncio.wait_for(read(), engine.limits.reading)
    except (asyncio.TimeoutError, TimeoutError) as error:
        raise Refused(408, f"the body was not whole after {engine.limits.reading:g} s") from error
    return bytes(body)


def _hash(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _name(host: str) -> str:
    """A Host header without its port."""
    return host if host.endswith("]") else host.rpartition(":")[0] or host
