"""The plain PyTorch loop of one process: the readable reference that the Trainer must equal."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.loss.plan import FirstPass
from selectkd.models.precision import FP32, Precision
from selectkd.training.feed import BatchFeed
from selectkd.training.first_pass import MicroBatch
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel

MAX_GRAD_NORM = 1.0


def train_loop(
    model: DistillationModel,
    feed: BatchFeed,
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    schedule: Any = None,
    accumulation: int = 1,
    precision: Precision = FP32,
) -> Iterator[dict[str, Any]]:
    """Trains the student in place and yields the log line of each of ``steps`` optimizer steps.

    It equals ``LedgerTrainer`` on the same micro-batches, on one device and without checkpoints. optimizer: of the
    model's trainable parameters; schedule: of its learning rate. Gradients longer than MAX_GRAD_NORM are scaled down.
    precision: what the forward pass multiplies in. A step whose loss or gradient norm is not finite leaves parameters
    and optimizer as they are; NumericsError where too many do.
    """
    model.train().to(ledger.device)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def first_pass(micro: MicroBatch, first: FirstPass) -> list[Tensor]:
        with precision.autocast(ledger.device):
            return model(micro.batch, micro.row_scale, micro.uniform, first)

    for batches in islice(feed.steps(accumulation), steps):
        for micro in ledger.begin(batches, first_pass):
            with precision.autocast(ledger.device):
                loss, sums = model(micro.batch, micro.row_scale, micro.uniform, micro.plan)
            loss.backward()
            ledger.add(micro, loss, sums)
        ledger.reduce(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        rate = optimizer.param_groups[0]["lr"]
        if ledger.close_step(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule is not None:
            schedule.step()
        yield ledger.line() | {"lr": rate, "grad_norm": ledger.grad_norm}
