"""A script as two ranks on this machine (gloo)."""

from __future__ import annotations

import socket
from pathlib import Path

from faults.forked import Forked


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_on_two_ranks(script: Path, *arguments: str, codes: tuple[int, int] = (0, 0)) -> str:
    """What rank 0 printed. The processes end with ``codes``, or the test fails with what they said."""
    port, both = free_port(), []
    for rank in ("0", "1"):
        said = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
        }
        both.append(Forked(str(script), *arguments, environment=said))
    try:
        told = [one.end(600) for one in both]
        ended = [one.returncode for one in told]
        assert ended == list(codes), "\n".join([str(ended), *(one.stderr[-3000:] for one in told)])
    finally:
        for one in both:
            one.kill()
    return told[0].stdout
