"""Two steps on the pretended GPU are the CPU's: every verifier, selector, divergence, kind of teacher and method."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpu.launcher import pretended_with_kernels
from gpu.pretended import pretended
from selectkd import CachedRows, Objective
from selectkd.config import load_recipe
from selectkd.config.methods import METHODS
from selectkd.objective.divergences import DIVERGENCES, LABEL_LOSSES, is_unpaired
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS
from selectkd.teachers import LiveTeacher
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.loop import train_loop
from selectkd.training.run import train
from selectkd.training.step import DistillationModel
from training.tiny import padded, recipe_of, texts, tiny_llama, write_pair

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
PLACE = torch.device("cuda:0")
BY_KERNELS = ("greedy_topk", "label_top_k", "se_kd")  # statistics, the text's token, a first pass


class Stored:
    """A teacher of which the ``k`` best tokens of each row are kept, as a cache keeps them."""

    def __init__(self, teacher: LiveTeacher, k: int) -> None:
        self.teacher, self.k = teacher, k

    @torch.no_grad()
    def __call__(self, batch: Any, position: torch.Tensor) -> CachedRows:
        rows = self.teacher(batch, position)
        logp, ids = torch.log_softmax(rows.hidden @ rows.head.weight.T, -1).topk(self.k)
        return CachedRows(ids, logp)


def losses(
    device: str, divergence: Any, verifier: Any, *, stored: int = 0, texts_a_step: int = 2
) -> list[float]:
    """The loss of each of two steps."""
    batches = padded(texts(2 * texts_a_step), texts_a_step)
    student = tiny_llama(2, layers=1).to(device)
    reference = LiveTeacher(tiny_llama(3, layers=1))
    live = LiveTeacher(tiny_llama(1, layers=1, hidden=48), reference=reference)
    ledger = Ledger(Objective(divergence, verifier, beta=0.1), streams=("a", "b"), device=device)
    model = DistillationModel(student, Stored(live, stored) if stored else live)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-5, weight_decay=0.0)
    steps = train_loop(model, BatchFeed(lambda _: batches), ledger, optimizer, steps=2)
    return [line["loss"] for line in steps]


def check(*case: Any, **options: Any) -> None:
    with pretended() as gpu:
        there = losses("cuda", *case, **options)
    assert set(gpu.launched_on) == {PLACE}
    here = losses("cpu", *case, **options)
    assert there == pytest.approx(here, rel=1e-5) and here[0] > 0.0


@pytest.mark.parametrize("verifier", BY_KERNELS)
def test_steps_by_the_kernels_are_the_cpus(verifier):
    with pretended_with_kernels() as gpu:
        there = losses("cuda", "forward_kl", verifier, texts_a_step=1)  # few rows for Triton's interpreter
    assert set(gpu.launched_on) == {PLACE} and gpu.gradient.count > 0
    assert there == pytest.approx(losses("cpu", "forward_kl", verifier, texts_a_step=1), rel=1e-5)


@pytest.mark.parametrize("verifier", [*VERIFIERS, *SELECTORS])
def test_steps_with_each_verifier_and_selector_are_the_cpus(verifier, without_kernels):
    check("forward_kl", verifier)


@pytest.mark.parametrize("divergence", [*DIVERGENCES, *LABEL_LOSSES])
def test_steps_with_each_divergence_are_the_cpus(divergence, without_kernels):
    check(divergence, "greedy_topk")


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if not is_unpaired(DIVERGENCES[name])])
def test_steps_with_a_stored_teacher_are_the_cpus(divergence, without_kernels):
    check(divergence, "greedy_topk", stored=8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, tiny_llama(1, layers=1, hidden=48))
    return folder


def trained(pair: Path, method: str, device: str, folder: Path) -> list[float]:
    """The losses that two steps of a method leave in its run folder."""
    looks = METHODS[method].needs
    recipe = recipe_of(
        pair,
        method=method,
        data={"evaluation": 0.1} if "data.evaluation" in looks else {},
        training={
            "output_dir": str(folder / device), "max_steps": 2, "batch_size": 2, "max_length": 24,
            "max_prompt_length": 8, "precision": "fp32", "probe_samples": 0, "save_every": None,
            **({"evaluate_every": 1} if "training.evaluate_every" in looks else {}),
        },
        **({"reference": {"model": str(pair / "student")}} if "reference" in looks else {}),
    )  # fmt: skip
    path = folder / f"{device}.json"
    path.write_text(json.dumps(recipe))
    train(load_recipe(path), device=device)
    lines = map(json.loads, (folder / device / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_each_method_are_the_cpus(method, pair, tmp_path, without_kernels):
    with pretended() as gpu:
        there = trained(pair, method, "cuda", tmp_path)
    assert set(gpu.launched_on) == {PLACE}
    here = trained(pair, method, "cpu", tmp_path)
    assert len(here) == 2 and there == pytest.approx(here, rel=1e-5)
