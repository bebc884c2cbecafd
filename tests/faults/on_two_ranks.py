"""A script as two ranks on this machine (gloo)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


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
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        room = {**os.environ, **said, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(script), *arguments]
        both.append(
            subprocess.Popen(command, env=room, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    told = []
    try:
        for one in both:
            told.append(one.communicate(timeout=600))
        ended = [one.returncode for one in both]
        assert ended == list(codes), "\n".join([str(ended), *(text[-3000:] for _, text in told)])
    finally:
        for one in both:
            one.kill()
            one.wait()
    return told[0][0]
