"""The plain PyTorch loop: the readable reference, which the Trainer must equal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from selectkd.loss.plan import FirstPass
from selectkd.models.precision import FP32, Precision
from selectkd.training.checkpoint import Checkpoints
from selectkd.training.checkpoint.parts import Named, OptimizerState, Weights
from selectkd.training.counts import ranks
from selectkd.training.feed import Feed
from selectkd.training.first_pass import Portion
from selectkd.training.ledger import Ledger
from selectkd.training.optimizer import optimizer_for
from selectkd.training.step import DistillationModel

SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant_with_warmup"}
"""A recipe's name of a learning-rate schedule, and the one transformers knows it by; all of them warm up."""

OnLine = Callable[[dict[str, Any]], None]
AfterStep = Callable[[int], bool]


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
    optimizer: str = "adamw",
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    precision: Precision = FP32,
    max_grad_norm: float = 1.0,
    accumulation: int = 1,
    log_every: int = 1,
    on_line: OnLine | None = None,
    after_step: AfterStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> None:
    """Trains the student in place for ``steps`` optimizer steps, or until ``after_step(step)`` is True.

    Parameters keep their dtype; precision: what the forward pass multiplies in. optimizer, betas, eps: as of
    ``optimizer_for``. A step whose loss or gradient norm is not finite on any rank leaves parameters and optimizer as
    they are. max_grad_norm = 0 does not clip. ``on_line`` gets every log line. With ``checkpoints`` the run goes on
    from the opened one and saves as they say. Raises NumericsError when too many steps were left out.
    """
    wrapped = wrapped_for(model.train(), ledger.device)
    stepper = optimizer_for(
        model, name=optimizer, learning_rate=learning_rate, weight_decay=weight_decay, betas=betas, eps=eps
    )
    lr = get_scheduler(SCHEDULES[schedule], stepper, num_warmup_steps=warmup_steps, num_training_steps=steps)
    parameters = [p for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def ask(portion: Portion, first: FirstPass) -> list[Tensor]:
        with precision.autocast(ledger.device):
            return wrapped(portion.batch, portion.row_scale, portion.uniform, first)

    if checkpoints is not None:
        checkpoints.register("ledger", ledger)
        register_engine(checkpoints, model, feed, stepper, lr)
        checkpoints.begin()

    for micro in feed.steps(accumulation):
        for portion in ledger.begin(micro, ask):
            waits = contextlib.nullcontext() if portion.last else wrapped.no_sync()
            with waits:
                with precision.autocast(ledger.device):
                    loss, sums = wrapped(portion.batch, portion.row_scale, portion.uniform, portion.plan)
                loss.backward()
            ledger.add(portion, loss, sums)
        model.finish_gradient()
        ledger.settle(parameters)
        norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm if max_grad_norm > 0 else float("inf"))
        rate = stepper.param_groups[0]["lr"]
        if ledger.accept(norm):
            stepper.step()
        lr.step()
        stepper.zero_grad(set_to_none=True)

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


def wrapped_for(model: DistillationModel, device: torch.device | str) -> Any:
    """The model on its device, and around it what averages gradients over ranks; a sharded student does so itself.

    Among replicas a parameter that a rank's rows do not reach counts as 0 there. Without ``find_unused_parameters`` the
    ranks wait for its gradient (a head where no row weighs anything), or take another's for it. One that no rank
    reaches keeps no gradient, as in one process.
    """
    if model.is_distributed_loading_by_transformers:
        return model
    model.to(device)
    return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if ranks() > 1 else model


def register_engine(
    checkpoints: Checkpoints,
    model: DistillationModel,
    feed: Feed,
    optimizer: Any,
    scheduler: Any,
) -> None:
    """What any engine adds to a run's checkpoints; where the run goes on, all of it has its state afterwards."""
    checkpoints.register("student", Weights(model.student), heavy=True)
    checkpoints.register("optimizer", OptimizerState(optimizer), heavy=True)
    checkpoints.register("scheduler", scheduler, heavy=True)
    checkpoints.register("feed", feed)
    checkpoints.register("loss", Named(model, "chunk"))
