"""Every verb on the pretended GPU: it runs where ``--device`` says, and the host waits no more than it must."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpu.launcher import pretended_with_kernels
from selectkd.cli import main
from training.tiny import tiny_llama, write_pair

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
    pytest.mark.filterwarnings("ignore"),  # of accelerate and the Trainer, about the device that is not there
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A pair, a recipe, one with a cache, and a finished run of the recipe."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, tiny_llama(1, layers=1, hidden=48))
    content: dict[str, Any] = {
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")},
        "data": {"sources": [{"path": str(folder / "text.jsonl"), "name": "made"}], "evaluation": 0.25},
        "objective": {"verifier": {"name": "greedy_topk", "k": 20}, "beta": 0.1},
        "training": {
            "output_dir": str(folder / "run"), "max_steps": 2, "batch_size": 3, "max_length": 32,
            "max_prompt_length": 16,
        },
    }  # fmt: skip
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    content["teacher"]["cache"] = str(folder / "cache")
    (folder / "c.yaml").write_text(yaml.safe_dump(content))
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        assert main(["train", str(folder / "r.yaml"), "--device", "cpu"]) == 0, said.getvalue()
    return folder


ELSEWHERE = ["--set", "training.output_dir=elsewhere"]
VERBS = {
    "train": ["train", "r.yaml"],
    "train by the loop": ["train", "r.yaml", "--set", "training.engine=loop"],
    "doctor": ["doctor", "r.yaml", *ELSEWHERE],
    "panel": ["panel", "r.yaml"],
    "generate": ["generate", "r.yaml", "--out", "t.jsonl", "--by", "teacher+student"],
    "cache build": ["cache", "build", "c.yaml"],
    "eval perplexity": ["eval", "student", "--suite", "perplexity", "--data", "text.jsonl"],
    "eval math": [
        "eval",
        "student",
        "--suite",
        "math",
        "--limit",
        "2",
        "--tokens",
        "2",
        "--memory",
        "m.jsonl",
    ],
    "landscape": ["landscape", "run", "--loss", "kl", "--points", "3", "--kicks", "1", "--samples", "2"],
    "speculate": [
        "speculate",
        "--target",
        "teacher",
        "--draft",
        "student",
        "--lengths",
        "2",
        "--tokens",
        "4",
    ],
}


def ran(arguments: list[str], folder: Path, devices: int = 1) -> Any:
    """The pretended GPUs after a command line that must succeed."""
    said = io.StringIO()
    with (
        contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext(),
        pretended_with_kernels(devices) as gpu,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        code = main(arguments)
    assert code == 0, said.getvalue()[-1500:]
    return gpu


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_uses_the_gpu_that_is_there(verb, root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    own = ["--set", f"training.output_dir={tmp_path / 'run'}"] if verb.startswith("train") else []
    gpu = ran([*VERBS[verb], *own], root)
    assert set(gpu.launched_on) == {torch.device("cuda:0")}, gpu.launched_on


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_one_process_trains_on_one_of_two_gpus(device, root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    for engine in ("trainer", "loop"):
        changes = [f"training.output_dir={tmp_path / engine}", f"training.engine={engine}"]
        gpu = ran(["train", "r.yaml", "--device", device, "--set", changes[0], "--set", changes[1]], root, 2)
        assert set(gpu.launched_on) == {torch.device("cuda:1" if device == "cuda:1" else "cuda:0")}
