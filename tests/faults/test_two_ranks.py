"""Two ranks decide alike and go on alike: weights, optimizer and metrics to the byte."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

from faults.number_runs import ROWS
from faults.tiny_run import left


def on_two_ranks(script: str, *arguments: str) -> str:
    """Runs a script of this folder on two ranks (gloo); what rank 0 printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    both, told = [], []
    for rank in ("0", "1"):
        said = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        room = {**os.environ, **said, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
        both.append(
            subprocess.Popen(command, env=room, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        for one in both:
            told.append(one.communicate(timeout=600))
        assert [one.returncode for one in both] == [0, 0], "\n".join(text[-3000:] for _, text in told)
    finally:
        for one in both:
            one.kill()
            one.wait()
    return told[0][0]


def test_two_ranks_skip_the_same_step_stop_together_and_go_on_to_the_same_bytes(
    pair: Path, tmp_path: Path
) -> None:
    """A NaN on rank 1 alone leaves the step out on both; a SIGTERM that rank 1 alone hears stops and saves both."""
    on_two_ranks("two_rank_runs.py", str(tmp_path), str(pair))
    for engine in ("loop", "trainer"):
        assert left(tmp_path / engine / "stops") == left(tmp_path / engine / "whole")
        bad = {path.name for path in (tmp_path / engine / "whole" / "bad_batches").iterdir()}
        assert bad == {"step-000002-rank-0.json", "step-000002-rank-1.json"}


def test_no_number_that_fails_reaches_a_parameter_on_either_engine_and_both_ranks_decide_alike(
    pair: Path, tmp_path: Path
) -> None:
    told = on_two_ranks("number_runs.py", str(tmp_path), str(pair)).splitlines()
    assert sum(line.endswith("finite, both ranks alike") for line in told) == 2 * len(ROWS)


def test_a_sharded_student_goes_on_to_the_same_bits_and_trains_as_a_replicated_one(tmp_path: Path) -> None:
    """FSDP2 over two processors: the checkpoint is gathered, and taken apart again where the run goes on."""
    told = on_two_ranks("sharded_runs.py", str(tmp_path))
    assert "the same to the bit after resuming" in told and "as by DDP" in told
