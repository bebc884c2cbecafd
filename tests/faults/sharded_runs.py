"""A student sharded over two ranks by FSDP2 (gloo): trained whole, in two halves, and beside the plain loop's DDP.

torchrun --nproc-per-node 2 sharded_runs.py FOLDER
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from selectkd import Objective
from selectkd.teachers.live import LiveTeacher
from selectkd.training.checkpoint import Checkpoints
from selectkd.training.checkpoint.encoding import whole
from selectkd.training.checkpoint.folder import Found, find
from selectkd.training.counts import rank
from selectkd.training.feed import Feed
from selectkd.training.ledger import Ledger
from selectkd.training.loop import register_engine, train_loop
from selectkd.training.optimizer import optimizer_for
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts, tiny_llama

STEPS, HALF, RATE = 6, 3, 1e-2


def parts() -> tuple[DistillationModel, Feed, Ledger]:
    model = DistillationModel(tiny_llama(2), LiveTeacher(tiny_llama(1)))
    objective = Objective("forward_kl", {"name": "spec_k", "k": 2}, beta=0.1)
    ledger = Ledger(objective, "weight_mean", streams=("a", "b"), total_steps=STEPS)
    return model.train(), Feed(lambda epoch: padded(texts(12), 2)), ledger


def sharded(folder: Path, opened: Found | None, steps: int) -> dict[str, torch.Tensor]:
    """The whole weights and the optimizer's moments after step ``steps``, from the beginning or from ``opened``."""
    model, feed, ledger = parts()
    for layer in model.student.get_decoder().layers:
        fully_shard(layer)
    fully_shard(model)
    parameters = list(model.parameters())
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    optimizer = optimizer_for(model, learning_rate=RATE, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    checkpoints = Checkpoints(folder, every=HALF, opened=opened)
    checkpoints.register("ledger", ledger)
    register_engine(checkpoints, model, feed, optimizer, scheduler)
    checkpoints.begin()
    for micro in feed.steps(1):
        (portion,) = ledger.begin(micro)
        loss, sums = model(portion.batch, portion.row_scale, portion.uniform, ledger.plan)
        loss.backward()
        ledger.add(portion, loss, sums)
        ledger.settle(parameters)
        if ledger.accept(torch.nn.utils.clip_grad_norm_(parameters, 1.0)):
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


def replicated() -> dict[str, torch.Tensor]:
    """The same steps by the plain loop."""
    model, feed, ledger = parts()
    train_loop(model, feed, ledger, steps=STEPS, learning_rate=RATE, schedule="constant")
    return {name: p.detach() for name, p in model.named_parameters()}


def on_both(what: Callable[[], Any]) -> Any:
    """What it gives, once both ranks are there."""
    dist.barrier()
    return what()


def main(folder: Path) -> None:
    reference = on_both(lambda: sharded(folder / "whole", None, STEPS))
    on_both(lambda: sharded(folder / "halves", None, HALF))
    opened, _ = find(folder / "halves")
    assert opened is not None and opened.step == HALF
    resumed = on_both(lambda: sharded(folder / "halves", opened, STEPS))
    assert reference.keys() == resumed.keys()
    apart = [name for name in reference if not torch.equal(reference[name], resumed[name])]
    assert not apart, f"rank {rank()}: not the same after resuming: {apart}"
    plain = on_both(replicated)
    for name, value in plain.items():
        torch.testing.assert_close(reference[name], value, rtol=1e-3, atol=1e-5)
    if rank() == 0:
        print(f"sharded: {len(resumed)} tensors the same to the bit after resuming, {len(plain)} as by DDP")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    main(Path(sys.argv[1]))
    gc.collect()  # torch hangs where the last DistributedDataParallel goes after its process group
    dist.destroy_process_group()
