"""A student sharded over two ranks as accelerate does it, the loss around it being FSDP2's root (gloo): measured,
trained whole, in two halves, and beside DDP.

torchrun --nproc-per-node 2 sharded_runs.py FOLDER
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments

from selectkd import Objective
from selectkd.models.sharded import is_sharded, plain_copy
from selectkd.rollouts.generate import Request, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.live import LiveTeacher
from selectkd.training.checkpoint import Checkpoints
from selectkd.training.checkpoint.encoding import whole
from selectkd.training.checkpoint.folder import Found, find
from selectkd.training.counts import rank
from selectkd.training.feed import BatchFeed
from selectkd.training.heldout.evaluation import evaluate, probe
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer, register_training
from training.tiny import padded, texts, tiny_llama

STEPS, HALF, RATE = 6, 3, 1e-2


def parts() -> tuple[DistillationModel, BatchFeed, Ledger]:
    model = DistillationModel(tiny_llama(2), LiveTeacher(tiny_llama(1)))
    objective = Objective("forward_kl", {"name": "spec_k", "k": 2}, beta=0.1)
    ledger = Ledger(objective, "weight_mean", streams=("a", "b"), total_steps=STEPS)
    return model.train(), BatchFeed(lambda epoch: padded(texts(12), 2)), ledger


def in_parts() -> tuple[DistillationModel, BatchFeed, Ledger]:
    """``parts``, sharded by the layers that accelerate finds by their names."""
    model, feed, ledger = parts()
    kinds = model._no_split_modules
    for layer in model.modules():
        if type(layer).__name__ in kinds:
            fully_shard(layer)
    fully_shard(model)
    return model, feed, ledger


def measured(model: DistillationModel) -> tuple[Any, ...]:
    """What evaluation, probe and generation say of a student, and its weights as a plain copy has them."""
    objective = Objective("forward_kl", {"name": "spec_k", "k": 2}, beta=0.1)
    batches = padded(texts(4), 2)
    seen = evaluate(model.student, model.teacher, batches, objective, streams=("a", "b"))
    verdicts = probe(model.student, model.teacher, batches[0], objective)
    prompts = [Request([5, 9, 17], 6), Request([4], 6)]
    written = generate([model.student], prompts, Draw(Sampling()), ends={2}, width=64)
    copied = plain_copy(model.student) if is_sharded(model.student) else model.student
    weights = {} if copied is None else copied.state_dict()
    return seen, verdicts, written, weights


def check_measured() -> None:
    """A student that accelerate has sharded says what a whole one does, before and after a step."""
    (whole_model, feed, _), (model, _, ledger) = parts(), in_parts()
    for _ in range(2):
        (seen, verdicts, written, weights), other = measured(whole_model), measured(model)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        assert other[0] == seen and torch.equal(other[1], verdicts) and other[2] == written
        if rank() == 0:
            assert weights.keys() == other[3].keys()
            assert all(torch.equal(weights[name], value) for name, value in other[3].items())
        (micro_batch,) = ledger.begin(next(iter(feed.steps(1))))
        model.train()(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.plan)[
            0
        ].backward()


def sharded(folder: Path, opened: Found | None, steps: int) -> dict[str, torch.Tensor]:
    """The whole weights and the optimizer's moments after step ``steps``, from the beginning or from ``opened``."""
    model, feed, ledger = in_parts()
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    checkpoints = Checkpoints(folder, every=HALF, opened=opened)
    checkpoints.register("ledger", ledger)
    register_training(checkpoints, model, feed, optimizer, scheduler)
    checkpoints.begin()
    for micro in feed.steps(1):
        (micro_batch,) = ledger.begin(micro)
        loss, sums = model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.plan)
        loss.backward()
        ledger.add(micro_batch, loss, sums)
        ledger.reduce(parameters)
        if ledger.close_step(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
            optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        checkpoints.after(ledger.step)
        if ledger.step == steps:
            break
    moments = {
        f"{index}.{name}": whole(value)
        for index, entries in optimizer.state_dict()["state"].items()
        for name, value in entries.items()
    }
    return {**{name: whole(p) for name, p in model.named_parameters()}, **moments}


def replicated(folder: Path) -> dict[str, torch.Tensor]:
    """The same steps by the Trainer's DDP."""
    model, feed, ledger = parts()
    args = TrainingArguments(
        str(folder), max_steps=STEPS, learning_rate=RATE, lr_scheduler_type="constant", optim="adamw_torch",
        use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    LedgerTrainer(model, feed, ledger, args).train()
    return {name: p.detach() for name, p in model.named_parameters()}


def on_both(what: Callable[[], Any]) -> Any:
    """What it gives, once both ranks are there."""
    dist.barrier()
    return what()


def main(folder: Path) -> None:
    on_both(check_measured)
    reference = on_both(lambda: sharded(folder / "whole", None, STEPS))
    on_both(lambda: sharded(folder / "halves", None, HALF))
    opened, _ = find(folder / "halves")
    assert opened is not None and opened.step == HALF
    resumed = on_both(lambda: sharded(folder / "halves", opened, STEPS))
    assert reference.keys() == resumed.keys()
    apart = [name for name in reference if not torch.equal(reference[name], resumed[name])]
    assert not apart, f"rank {rank()}: not the same after resuming: {apart}"
    plain = on_both(lambda: replicated(folder / "replicated"))
    for name, value in plain.items():
        torch.testing.assert_close(reference[name], value, rtol=1e-3, atol=1e-5)
    if rank() == 0:
        print(f"sharded: {len(resumed)} tensors the same to the bit after resuming, {len(plain)} as by DDP")


if __name__ == "__main__":
    torch.set_num_threads(1)
    PartialState(cpu=True)
    main(Path(sys.argv[1]))
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
