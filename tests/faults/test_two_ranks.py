"""Two ranks decide alike and go on alike: weights, optimizer and metrics to the byte."""

from __future__ import annotations

from pathlib import Path

from faults.number_runs import ROWS
from faults.on_two_ranks import run_on_two_ranks
from faults.tiny_run import left
from selectkd.training.checkpoint.folder import all_in


def test_two_ranks_skip_the_same_step_stop_together_and_go_on_to_the_same_bytes(
    pair: Path, tmp_path: Path
) -> None:
    """A NaN on rank 1 alone leaves the step out on both; a SIGTERM that rank 1 alone hears stops and saves both."""
    run_on_two_ranks(Path(__file__).with_name("two_rank_runs.py"), str(tmp_path), str(pair))
    assert left(tmp_path / "stops") == left(tmp_path / "whole")
    bad = {path.name for path in (tmp_path / "whole" / "bad_batches").iterdir()}
    assert bad == {"step-000002-rank-0.json", "step-000002-rank-1.json"}


def test_no_number_that_fails_reaches_a_parameter_and_both_ranks_decide_alike(
    pair: Path, tmp_path: Path
) -> None:
    script = Path(__file__).with_name("number_runs.py")
    told = run_on_two_ranks(script, str(tmp_path), str(pair)).splitlines()
    assert sum(line.endswith("finite, both ranks alike") for line in told) == len(ROWS)


def test_a_rank_without_memory_ends_with_7_no_rank_waits_for_it_and_the_run_goes_on(
    pair: Path, tmp_path: Path
) -> None:
    """N8 on one rank alone: what was saved is whole, and the same command goes on to the bytes of a whole run."""
    script, run = Path(__file__).with_name("one_rank_fails.py"), tmp_path / "run"
    told = run_on_two_ranks(script, str(tmp_path), str(pair), "fails", codes=(0, 7))
    assert "rank 0 heard of it" in told
    saved = [found.name for found in all_in(run / "checkpoints")]
    assert saved == ["step-00000002"]
    run_on_two_ranks(script, str(tmp_path), str(pair), "whole")
    assert left(run) == left(tmp_path / "whole")


def test_a_sharded_student_goes_on_to_the_same_bits_and_trains_as_a_replicated_one(tmp_path: Path) -> None:
    """FSDP2 over two processors: the checkpoint is gathered, and taken apart again where the run goes on."""
    told = run_on_two_ranks(Path(__file__).with_name("sharded_runs.py"), str(tmp_path))
    assert "the same to the bit after resuming" in told and "as by DDP" in told
