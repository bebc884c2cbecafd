"""How often the host waits for the pretended GPU: once an optimizer step, but for what transformers asks by itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from gpu.launcher import pretended_with_kernels
from gpu.pretended import Gpu, pretended
from selectkd import Objective
from selectkd.data.supervised import in_memory, supervised
from selectkd.loss.plan import StreamSpec
from selectkd.teachers import LiveTeacher
from selectkd.teachers.aligned import row_of_token
from selectkd.teachers.remote.teacher import samples_of
from selectkd.training.checkpoint.encoding import gather
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.loop import train_loop
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer
from training.tiny import padded, texts, tiny_llama

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]
GREEDY = Objective("forward_kl", {"name": "greedy_topk", "k": 9}, beta=0.1)
STREAMS = {"one loss": [], "a loss for each stream": [StreamSpec(), StreamSpec(divergence="reverse_kl")]}
OTHERS = (
    "models/head.py",  # transformers looks whether a mask hides anything
    "training/trainer.py",  # the Trainer reads its own sum of losses for its log line
)


def batches(_: int) -> list[Any]:
    return padded(texts(4), 2)


def ours(gpu: Gpu) -> list[str]:
    """The lines of the package where the host waited, those that a library asked from aside."""
    return [line for line in gpu.waits() if not line.startswith(OTHERS)]


@pytest.mark.parametrize("streams", STREAMS)
def test_the_loop_waits_once_an_optimizer_step(streams):
    with pretended_with_kernels() as gpu:
        ledger = Ledger(GREEDY, streams=("a", "b"), device="cuda", losses=STREAMS[streams])
        model = DistillationModel(tiny_llama(2).to("cuda"), LiveTeacher(tiny_llama(1, hidden=48)))
        optimizer = torch.optim.AdamW(model.student.parameters(), fused=True)
        steps = train_loop(model, BatchFeed(batches), ledger, optimizer, steps=2, accumulation=2)
        next(steps)
        gpu.reset()
        next(steps)
    found = [line for line in ours(gpu) if "train_loop" not in line]  # where the norm is clipped, an artefact
    assert len(found) == 1 and "close_step" in found[0], gpu.report()
    assert not gpu.pageable, gpu.report()


def test_the_trainer_waits_fourteen_times_of_which_one_is_ours(tmp_path):
    args = {"max_steps": 2, "gradient_accumulation_steps": 2, "logging_steps": 1, "report_to": "none"}
    with pretended_with_kernels() as gpu:
        trainer = LedgerTrainer(
            DistillationModel(tiny_llama(2), LiveTeacher(tiny_llama(1, hidden=48))), BatchFeed(batches),
            Ledger(GREEDY, streams=("a", "b")),
            TrainingArguments(output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True, **args),
            after_step=lambda step: gpu.reset() if step < 2 else None,
        )  # fmt: skip
        trainer.train()
    assert len(ours(gpu)) == 1 and "close_step" in ours(gpu)[0], gpu.report()
    assert sum(gpu.syncs.values()) <= 14, gpu.report()


def test_what_is_read_of_a_batch_on_the_host_is_read_from_its_origin():
    with pretended() as gpu:
        batch = padded(texts(6), 3)[0].to("cuda")
        seen = supervised(batch)
        here, position = in_memory(batch, seen.position)
        samples_of(batch, seen.position)
        row_of_token(batch, seen.position, [len(ids) for ids in batch.samples()])
    assert not gpu.syncs and not gpu.pageable, gpu.report()
    assert here.input_ids.device.type == position.device.type == "cpu"


def test_a_rank_that_does_not_write_a_checkpoint_copies_nothing_to_main_memory():
    with pretended() as gpu:
        state = {"student": {"head": torch.ones(3, device="cuda")}, "moments": [torch.ones(2, device="cuda")]}
        gpu.reset()
        gather(state)
    assert not gpu.syncs and not gpu.launches, gpu.report()


def test_the_window_of_sums_is_emptied_where_nobody_hears_the_lines():
    ledger = Ledger(GREEDY, streams=("a", "b"))
    model = DistillationModel(tiny_llama(2), LiveTeacher(tiny_llama(1, hidden=48)))
    optimizer = torch.optim.SGD(model.student.parameters(), lr=1e-3)
    assert len(list(train_loop(model, BatchFeed(batches), ledger, optimizer, steps=3))) == 3
    assert ledger.state_dict()["window"] == []
