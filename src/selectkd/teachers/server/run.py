"""A server on a port: where it may listen, how long a client may take, and how it ends."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from selectkd.errors import ConfigError
from selectkd.teachers.remote.secrets import named
from selectkd.teachers.server.app import LOCAL, application
from selectkd.teachers.server.engine import Engine

GRACE = 10
"""Seconds that the server waits for answers under way after SIGTERM or SIGINT."""

SHORTEST_TOKEN = 16


class Impatient(H11Protocol):
    """uvicorn's HTTP, with an end to requests that never become whole and to answers that nobody reads."""

    reading, idle, most = 10.0, 10.0, 256
    _late: asyncio.TimerHandle | None = None
    _unread = 0

    def connection_made(self, transport: Any) -> None:
        if len(self.connections) >= self.most:
            transport.abort()
            return
        super().connection_made(transport)
        self._late = self.loop.call_later(self.reading, self._too_late)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()
        elif self._late is None:
            self._late = self.loop.call_later(self.reading, self._too_late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        if self in self.connections:
            super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.is_closing():
            return
        left = self.transport.get_write_buffer_size()
        if left == 0:
            super().timeout_keep_alive_handler()
        elif 0 < self._unread <= left:
            self.transport.abort()
        else:
            self._unread = left
            self.timeout_keep_alive_task = self.loop.call_later(self.idle, self.timeout_keep_alive_handler)

    def _too_late(self) -> None:
        self._late = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """uvicorn's server, which drops the connections it has closed and whose clients have not: TLS waits for both."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        connections = list(self.server_state.connections)
        await super().shutdown(sockets)
        for connection in connections:
            connection.transport.abort()
        await asyncio.sleep(0)  # the loop closes their sockets


def token_of(variable: str | None) -> str | None:
    """The token in a variable of the environment; ConfigError where it is not set or too short to be one."""
    if variable is None:
        return None
    token = os.environ.get(variable, "").strip()
    if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"--api-key-env names {named(variable)}, which holds no token of {SHORTEST_TOKEN} printable characters or "
            f'more. Make one: export {variable if named(variable) == variable else "NAME"}="$(openssl rand -hex 24)"'
        )
    return token


def check_place(host: str, token: str | None, certificate: Path | None, key: Path | None) -> None:
    """ConfigError unless the server stays on this machine, or asks for a token over TLS."""
    if (certificate is None) != (key is None):
        raise ConfigError(
            "--certificate and --key go together: the certificate and its private key, PEM files."
        )
    for path in (certificate, key):
        if path is not None and not path.is_file():
            raise ConfigError(f"{path} is not there. Name the PEM files of a certificate and its key.")
    try:
        local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(
            f"--host {host} is not an address. Use 127.0.0.1, or an address of this machine."
        ) from None
    if not local and (token is None or certificate is None):
        missing = [
            name
            for name, value in (("--api-key-env NAME", token), ("--certificate and --key", certificate))
            if not value
        ]
        raise ConfigError(
            f"--host {host} can be reached from other machines, so the server needs a token and TLS: "
            f"{' and '.join(missing)} are missing. Without them it listens on 127.0.0.1 alone."
        )


def listen(host: str, port: int) -> socket.socket:
    """The listening socket; ConfigError where the address or port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        raise ConfigError(
            f"{host} port {port} is not available: {error.strerror}. Use another --port."
        ) from error


def server_of(
    engine: Engine,
    *,
    token: str | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
) -> Server:
    """uvicorn with the app of an engine and the limits of it."""
    limits = engine.limits
    timed = {"reading": limits.reading, "idle": limits.idle, "most": 2 * limits.connections}
    config = uvicorn.Config(
        application(engine, token=token, hosts=LOCAL),
        http=type("Timed", (Impatient,), timed),
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        log_level="error",  # what clients do wrong is their own affair, and they would fill the disk with it
        access_log=False,
        server_header=False,
        date_header=False,
        limit_concurrency=limits.connections,
        timeout_keep_alive=round(limits.idle),
        timeout_graceful_shutdown=GRACE,
        h11_max_incomplete_event_size=16_384,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return Server(config)


def serve(
    engine: Engine,
    listener: socket.socket,
    *,
    token: str | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    ready: Callable[[str], None],
) -> None:
    """Answers until SIGTERM or SIGINT; answers under way are finished first. ``ready`` gets the address."""
    server = server_of(engine, token=token, certificate=certificate, key=key)
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    # uvicorn raises the signal again when it is done; SIGTERM has then done its work
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        ready(f"http{'' if certificate is None else 's'}://{name}:{port}")
        server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()
        engine.close()
