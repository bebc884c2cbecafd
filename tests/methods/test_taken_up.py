"""Runs whose text is written on the way go on, after a stop, to the bytes they would have left."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.test_resume import StopsAt
from faults.tiny_run import left
from selectkd.errors import Preempted
from selectkd.training.run import train

ADAPTIVE = {"name": "adaptive", "start": 0.7, "capacity": 5, "max_new_tokens": 4}
WINDOW = {"name": "adaptive_alpha", "window": 3}
RUNS: list[dict[str, Any]] = [
    {"method": {"name": "distillm2", "adaptive_alpha": True}, "objective": {"extras": [WINDOW]}},
    {"method": "imitkd", "training": {"log_every": 2}},
    {"method": "distillm", "data": {"policy": ADAPTIVE}, "selection": {"verifier": "spec_k", "k": 2}},
]


@pytest.mark.parametrize("said", RUNS, ids=lambda said: str(said["method"]))
def test_a_run_on_text_of_its_own_goes_on_to_the_same_bytes(
    said: dict[str, Any], recipe: Callable[..., Any], tmp_path: Path
) -> None:
    changed = {**said, "data": {"max_new_tokens": 5, **said.get("data", {})}}
    training = {"max_steps": 6, "evaluate_every": 2, "save_every": 2, **said.get("training", {})}

    def made(folder: str) -> Any:
        return recipe(**{**changed, "training": {**training, "output_dir": str(tmp_path / folder)}})

    train(made("whole"))
    stops = made("stops")
    with pytest.raises(Preempted, match="the state of step 4"):
        train(stops, progress=StopsAt(4, signal.SIGTERM))
    assert train(stops).resumed_from == 4
    assert left(tmp_path / "whole").items() <= left(tmp_path / "stops").items()
