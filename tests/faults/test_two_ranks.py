"""Two ranks decide alike and go on alike: weights, optimizer and metrics to the byte."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from faults.tiny_run import left


def test_two_ranks_skip_the_same_step_stop_together_and_go_on_to_the_same_bytes(
    pair: Path, tmp_path: Path
) -> None:
    """A NaN on rank 1 alone leaves the step out on both; a SIGTERM that rank 1 alone hears stops and saves both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = str(Path(__file__).with_name("two_rank_runs.py"))
    both = []
    for rank in ("0", "1"):
        said = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        room = {**os.environ, **said, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, script, str(tmp_path), str(pair)]
        both.append(subprocess.Popen(command, env=room, stderr=subprocess.PIPE, text=True))
    told = []
    try:
        for one in both:
            told.append(one.communicate(timeout=600)[1])
        assert [one.returncode for one in both] == [0, 0], "\n".join(text[-3000:] for text in told)
    finally:
        for one in both:
            one.kill()
            one.wait()
    for engine in ("loop", "trainer"):
        assert left(tmp_path / engine / "stops") == left(tmp_path / engine / "whole")
        bad = {path.name for path in (tmp_path / engine / "whole" / "bad_batches").iterdir()}
        assert bad == {"step-000002-rank-0.json", "step-000002-rank-1.json"}
