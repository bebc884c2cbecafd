"""Our own server on a port of loopback, in this process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from selectkd.models.load import load_model
from selectkd.teachers.server.engine import Engine
from selectkd.teachers.server.limits import Limits
from selectkd.teachers.server.run import listen, server_of


@contextmanager
def own_server(
    model: str, *, port: int = 0, batch: int = 1, limits: Limits | None = None, **keys: Any
) -> Iterator[str]:
    """The address of a server of ``model``; it has ended when the context has."""
    engine = Engine(load_model(model), dtype="float32", batch=batch, limits=limits)
    listener = listen("127.0.0.1", port)
    server = server_of(engine, **keys)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        engine.close()
