"""A student in parts over two ranks (FSDP2, gloo) trains as one process does, by torchrun and by accelerate."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from faults.on_two_ranks import free_port, run_on_two_ranks
from faults.tiny_run import left
from selectkd.errors import ConfigError
from selectkd.models.sharded import CAN_SHARD
from selectkd.training.preflight.doctor import without_weights
from selectkd.training.run import train
from selectkd.training.sharding import as_launched
from training.sharded_students import CASES, GREEDY, STOPPED, recipe, write_models

pytestmark = pytest.mark.skipif(not CAN_SHARD, reason="this transformers takes no model apart")
CLOSE = 1e-6
"""What two orders of the same fp32 sums may make of a loss, a norm, a divergence and, in few small steps, a weight."""
ONLY = (sys.executable, "-m")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("sharded"))


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def check_same(one: Path, other: Path) -> None:
    """Loss, gradient norm, held-out KL and weights of two runs; the student is a plain folder."""
    told, again = lines(one), lines(other)
    assert [line["step"] for line in told] == [line["step"] for line in again]
    for a, b in zip(told, again, strict=True):
        assert a.keys() == b.keys()
        for name in ("loss", "grad_norm", "kl", "tar", "probe_tar"):
            assert a.get(name) == pytest.approx(b.get(name), abs=CLOSE), (a["step"], name)
        if "evaluation" in a:
            assert a["evaluation"]["kl"] == pytest.approx(b["evaluation"]["kl"], abs=CLOSE)
    weights = [load_file(run / "student" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=CLOSE)
    loaded = AutoModelForCausalLM.from_pretrained(other / "student")
    assert torch.equal(loaded.model.norm.weight, weights[1]["model.norm.weight"])


def test_a_student_in_parts_over_two_ranks_is_that_of_one_process(pair: Path, tmp_path: Path) -> None:
    """Full and LoRA, greedy and spec-k, heads tied and not, the teacher sharded too, rollouts; a run that was stopped
    goes on to the same bytes; a spread or a model that cannot be is refused and leaves no folder.
    """
    script = Path(__file__).with_name("sharded_students.py")
    told = run_on_two_ranks(script, str(tmp_path), str(pair))
    for name, case in CASES.items():
        train(recipe(pair, tmp_path / "one" / name, case, ranks=2))
        check_same(tmp_path / "one" / name, tmp_path / name)
    for name in STOPPED:
        assert left(tmp_path / f"{name}, stopped") == left(tmp_path / name)
    refusals = [line for line in told.splitlines() if line.startswith("refused: ")]
    key = "training.sharding"
    for line, words in zip(
        refusals,
        (
            ("{fsdp: 3, replicate: 1}", key),
            ("{fsdp: all, replicate: 2}", key),
            ("fit 2 ranks", key),
            ("GPT2Model", key),
            ("damaged", ".safetensors"),
        ),
        strict=True,
    ):
        assert all(word in line for word in words), line


def launched(command: list[str], recipe_file: Path, folder: Path) -> subprocess.Popen[str]:
    room = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [*command, "-m", "selectkd", "train", str(recipe_file)]
    with (folder / "said.txt").open("a", encoding="utf-8") as said:
        return subprocess.Popen(
            command, env=room, stdout=said, stderr=subprocess.STDOUT, text=True, start_new_session=True
        )


def test_a_run_that_torchrun_began_and_a_kill_ended_goes_on_by_accelerate(pair: Path, tmp_path: Path) -> None:
    """By the command line: all processes killed in mid-run, the same recipe again, and what one process leaves."""
    case = {"verifier": GREEDY, "more": {"max_steps": 24}}
    meant = recipe(pair, tmp_path / "run", case, sharding={})
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(meant.model_dump(mode="json", exclude_none=True)), "utf-8")
    two = ["--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    first = launched([*ONLY, "torch.distributed.run", *two], file, tmp_path)
    try:
        while not (tmp_path / "run" / "checkpoints" / "step-00000004").exists():
            assert first.poll() is None, (tmp_path / "said.txt").read_text("utf-8")[-3000:]
            time.sleep(0.005)
    finally:
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    assert not (tmp_path / "run" / "manifest.json").exists()
    fsdp = [
        "--num_processes",
        "2",
        "--use_fsdp",
        "--fsdp_version",
        "2",
        "--main_process_port",
        free_port(),
    ]
    second = launched([*ONLY, "accelerate.commands.accelerate_cli", "launch", *fsdp], file, tmp_path)
    assert second.wait(timeout=300) == 0, (tmp_path / "said.txt").read_text("utf-8")[-3000:]
    train(recipe(pair, tmp_path / "one", case, ranks=2))
    check_same(tmp_path / "one", tmp_path / "run")


def test_one_process_refuses_to_shard_and_doctor_says_so(pair: Path, tmp_path: Path) -> None:
    alone = recipe(pair, tmp_path / "run", {"verifier": GREEDY}, sharding={"fsdp": 2})
    with pytest.raises(ConfigError, match=r"training\.sharding shares a model.*one process.*torchrun"):
        train(alone)
    found = {finding.check: finding for finding in without_weights(alone, torch.device("cpu"))}
    assert not found["sharding"].ok and found["sharding"].exit_code == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("FSDP_VERSION", "1", "--fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "--fsdp_offload_params"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "training.gradient_checkpointing"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "training.sharding"),
    ],
)
def test_what_accelerate_asks_of_fsdp_and_a_recipe_says_otherwise_is_refused_by_its_name(
    name: str, value: str, told: str, pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = recipe(pair, tmp_path / "run", {"verifier": GREEDY})
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with as_launched(plain) as meant:
        assert meant.training.sharding is not None and os.environ["ACCELERATE_USE_FSDP"] == "false"
    assert os.environ["ACCELERATE_USE_FSDP"] == "true"
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name} = {value}.*{told}"), as_launched(plain):
        pass
