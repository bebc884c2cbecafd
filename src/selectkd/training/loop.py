"""The plain PyTorch loop: the readable reference, which the Trainer must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from selectkd.training.checkpoint import Checkpoints, Stateful
from selectkd.training.checkpoint.parts import Named, OptimizerState, Weights
from selectkd.training.counts import ranks
from selectkd.training.feed import Feed
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""A recipe's name of a learning-rate schedule, and the one transformers knows it by; all of them warm up."""

OnLine = Callable[[dict[str, Any]], None]
AfterStep = Callable[[int], bool]


def decaying(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay is for: matrices, not the vectors of norms and biases."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def optimizer_for(model: nn.Module, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; weight decay on matrices alone."""
    chosen = set(decaying(model))
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name in chosen], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in chosen], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8)


def train_loop(
    model: DistillationModel,
    feed: Feed,
    ledger: Ledger,
    *,
    steps: int,
    learning_rate: float = 5e-5,
    schedule: str = "cosine",
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    accumulation: int = 1,
    log_every: int = 1,
    on_line: OnLine | None = None,
    after_step: AfterStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Trains the student in place for ``steps`` optimizer steps, or until ``after_step(step)`` is True.

    Parameters keep their dtype; there is no autocast. A step whose loss or gradient norm is not finite on any
    rank leaves parameters and optimizer as they are. max_grad_norm = 0 does not clip. ``on_line`` gets every
    log line. With ``checkpoints`` the run goes on from the opened one and saves as they say. Raises NumericsError
    when too many steps were left out.
    """
    model.to(ledger.device).train()
    wrapped: Any = replicated(model) if ranks() > 1 else model
    optimizer = optimizer_for(model, learning_rate=learning_rate, weight_decay=weight_decay)
    lr = get_scheduler(
        SCHEDULES[schedule], optimizer, num_warmup_steps=warmup_steps, num_training_steps=steps
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if checkpoints is not None:
        checkpoints.register("ledger", ledger)
        register_engine(checkpoints, model, feed, optimizer, lr)
        checkpoints.begin()

    for micro in feed.steps(accumulation):
        for portion in ledger.begin(micro):
            waits = contextlib.nullcontext() if portion.last or ranks() == 1 else wrapped.no_sync()
            with waits:
                loss, sums = wrapped(portion.batch, portion.row_scale, portion.uniform, ledger.plan)
                loss.backward()
            ledger.add(portion, loss, sums)
        ledger.settle(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else float("inf"))
        rate = optimizer.param_groups[0]["lr"]
        if ledger.accept(norm):
            optimizer.step()
        lr.step()
        optimizer.zero_grad(set_to_none=True)

        if ledger.step % log_every == 0 or ledger.step == steps:
            line = ledger.line()  # on every rank: it empties the window
            if on_line is not None:
                on_line(line | {"lr": rate, "grad_norm": ledger.grad_norm})
        over = ledger.step >= steps
        if after_step is not None:
            over = after_step(ledger.step) or over
        if checkpoints is not None:
            checkpoints.after(ledger.step, last=over)
        if over:
            return


def replicated(model: nn.Module) -> nn.parallel.DistributedDataParallel:
    """The model of each rank, its gradients averaged; a parameter that a rank's rows do not reach has its 0 there.

    Without ``find_unused_parameters`` the ranks wait for the gradient of such a parameter (a head where no row weighs
    anything), or take another's for it. One that no rank reaches keeps no gradient, as in one process.
    """
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def register_engine(
    checkpoints: Checkpoints,
    model: DistillationModel,
    feed: Feed,
    optimizer: Any,
    scheduler: Any,
    *,
    parts: Stateful | None = None,
) -> None:
    """What any engine adds to a run's checkpoints; where the run goes on, all of it has its state afterwards.

    parts: this rank's part of the optimizer, where each rank has another one.
    """
    checkpoints.register("student", Weights(model.student), heavy=True)
    if parts is None:
        checkpoints.register("optimizer", OptimizerState(optimizer), heavy=True)
    else:
        checkpoints.register("optimizer", parts, own=True)
    checkpoints.register("scheduler", scheduler, heavy=True)
    checkpoints.register("feed", feed)
    checkpoints.register("loss", Named(model, "chunk"))
