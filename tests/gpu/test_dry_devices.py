"""Every verb on the pretended GPU: it runs where ``--device`` says, and the host waits no more than it must."""

from __future__ import annotations

import contextlib
import io
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpu.launcher import pretended_with_kernels
from gpu.pretended import pretended
from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import ConfigError
from selectkd.loss import by_device
from selectkd.models.devices import device_of, out_of_memory
from selectkd.training.run import train
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
    texts = (folder / "text.jsonl").read_text().splitlines(keepends=True)
    (folder / "text.jsonl").write_text("".join(texts[:8]))
    content: dict[str, Any] = {
        "teacher": {"model": str(folder / "teacher")},
        "student": {"model": str(folder / "student")},
        "data": {"sources": [{"path": str(folder / "text.jsonl"), "name": "made"}], "evaluation": 0.25},
        "objective": {"verifier": {"name": "greedy_topk", "k": 20}, "beta": 0.1},
        "training": {
            "output_dir": str(folder / "run"), "max_steps": 1, "batch_size": 2, "max_length": 32,
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
    "doctor": ["doctor", "r.yaml", *ELSEWHERE],
    "panel": ["study", "panel", "r.yaml"],
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
    "landscape": [
        "study",
        "landscape",
        "run",
        "--loss",
        "kl",
        "--points",
        "3",
        "--kicks",
        "1",
        "--samples",
        "2",
    ],
    "speculate": [
        "study",
        "speculate",
        "--target",
        "teacher",
        "--draft",
        "student",
        "--lengths",
        "2",
        "--tokens",
        "2",
    ],
}


def ran(arguments: list[str], on: AbstractContextManager[Any]) -> Any:
    """The pretended GPUs ``on`` after a command line that must succeed."""
    said = io.StringIO()
    with (
        on as gpu,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        code = main(arguments)
    assert code == 0, said.getvalue()[-1500:]
    return gpu


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_uses_the_gpu_that_is_there(verb, root, monkeypatch, tmp_path):
    """By torch's own operations: Triton's interpreter is slow, and the kernels go where ``train`` goes below."""
    monkeypatch.chdir(root)
    monkeypatch.setitem(by_device._OBSTACLES, "cuda", "these tests do without")
    own = ["--set", f"training.output_dir={tmp_path / 'run'}"] if verb == "train" else []
    gpu = ran([*VERBS[verb], *own], pretended())
    assert set(gpu.launched_on) == {torch.device("cuda:0")}, gpu.launched_on


@pytest.mark.parametrize("device", ["auto", "cuda:1"])
def test_one_process_trains_on_one_of_two_gpus(device, root, monkeypatch, tmp_path):
    monkeypatch.chdir(root)
    changes = [f"training.output_dir={tmp_path / 'run'}"]
    changes += ["data.evaluation=null", "training.probe_samples=1"]  # few rows for Triton's interpreter
    arguments = ["train", "r.yaml", "--device", device, *(x for one in changes for x in ("--set", one))]
    gpu = ran(arguments, pretended_with_kernels(2))
    assert gpu.gradient.count > 0
    assert set(gpu.launched_on) == {torch.device("cuda:1" if device == "cuda:1" else "cuda:0")}


def told(word: str, devices: int) -> str:
    """What is said of a device that cannot be used."""
    with pretended(devices), pytest.raises(ConfigError) as error:
        device_of(word)
    return str(error.value)


def test_a_device_that_is_not_there_is_refused_with_those_that_are(monkeypatch):
    assert "This machine has cuda:0, cuda:1, cpu" in told("cuda:2", 2)
    assert "this machine has cuda:0, cpu" in told("gpu", 1) and "Use one of: auto, cpu" in told("cuda:", 1)
    assert "torch sees no mps" in told("mps", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "would put 2 processes on one device" in told("cuda:1", 2)
    with pretended(2):
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert device_of() == device_of("cuda") == torch.device("cuda:1")
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        assert device_of() == torch.device("cpu")


@pytest.mark.parametrize("verb", [*VERBS, "compare", "serve-teacher", "demo"])
def test_a_verb_refuses_a_device_that_is_not_there_before_it_loads_a_model(
    verb, root, monkeypatch, capsys, tmp_path
):
    others = {
        "compare": ["study", "compare", "r.yaml"],
        "demo": ["demo", "--quick", "--output-dir", str(tmp_path / "d")],
    }
    arguments = VERBS.get(verb) or others.get(verb) or ["serve-teacher", "no-such-model", "--port", "0"]
    monkeypatch.chdir(root)
    assert main([*arguments, "--device", "cuda:3"]) == 2
    said = "".join(capsys.readouterr())
    assert "--device cuda:3" in said and "This machine has cpu" in said and "loading" not in said


OUT_OF_MEMORY = [
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "HIP error: hipErrorOutOfMemory",
    "CUDA error: out of memory",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes",
]


@pytest.mark.parametrize("words", OUT_OF_MEMORY)
def test_an_allocation_that_failed_is_known_by_its_words(words):
    assert out_of_memory(RuntimeError(words))
    assert not out_of_memory(ConfigError(words))


def test_another_error_of_a_gpu_is_not_taken_for_a_lack_of_memory():
    assert not out_of_memory(RuntimeError("out of resource: shared memory, Required: 300000"))
    assert not out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"))


def test_a_teacher_that_writes_the_first_text_writes_it_on_the_gpu(root, tmp_path):
    """Nothing has asked it for a row by then: there is no held-out text and no probe."""
    changes = [
        "data.evaluation=null",
        "data.policy={name: teacher, max_new_tokens: 2}",
        "training.probe_samples=0",
    ]
    recipe = load_recipe(
        root / "r.yaml", [*changes, f"training.output_dir={tmp_path / 'run'}", "training.max_steps=1"]
    )
    seen = []
    with pretended_with_kernels():
        train(recipe, on_assembled=lambda made: seen.append(next(made.writer.teacher.parameters()).device))
    assert seen == [torch.device("cuda:0")]
