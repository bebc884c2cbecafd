"""One forward pass of student and teacher to the loss. n supervised rows, d student width, r uniforms."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from selectkd.data.supervised import supervised
from selectkd.errors import ResourceError
from selectkd.loss.by_device import chunk_rows
from selectkd.loss.head import product_dtype
from selectkd.loss.options import LossOptions
from selectkd.loss.plan import Extra, FirstPass, LossPlan
from selectkd.loss.terms import Forward, weighted_sum
from selectkd.models.devices import out_of_memory
from selectkd.models.forward import hidden_rows
from selectkd.models.head import head_of, unwrapped
from selectkd.models.sharded import at_work, average_gradients, head_whole, held_by, inside, is_sharded
from selectkd.objective.objective import Objective
from selectkd.teachers.protocol import Teacher
from selectkd.training.activations import activations_offloaded
from selectkd.training.checkpoint import Stateful

T = TypeVar("T")
_LOG = logging.getLogger("selectkd")


class DistillationModel(nn.Module):
    """The student whose forward is the distillation loss, so that what wraps it (DDP, FSDP) sees the whole
    step.

    The teacher is held beside the module: it is in neither ``parameters()`` nor ``state_dict()``. options: of the
    loss; without also_kl ``sums["kl"]`` is the divergence. offload: the student's activations wait in main memory
    (``activations_offloaded``), where the device has a memory of its own.
    """

    accepts_loss_kwargs = False

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        *,
        options: LossOptions | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        self.student = student
        self.options, self.offload = options or LossOptions(), offload
        held_by(student, self)
        self._beside = (teacher,)  # a tuple, so that nn.Module does not adopt it

    @property
    def teacher(self) -> Teacher:
        return self._beside[0]

    @property
    def chunk(self) -> int | None:
        """Rows worked on at once, which a checkpoint keeps: they are halved where memory runs out."""
        return self.options.chunk

    @chunk.setter
    def chunk(self, rows: int | None) -> None:
        self.options = replace(self.options, chunk=rows)

    @property
    def config(self) -> Any:
        """The student's configuration, for those who wrap models."""
        return self.student.config

    @property
    def is_distributed_loading_by_transformers(self) -> bool:
        """Whether the student is FSDP's root already: the Trainer then neither moves nor wraps what holds it."""
        return isinstance(unwrapped(self.student), FSDPModule)

    @property
    def _no_split_modules(self) -> Any:
        """The layers that accelerate shards each by itself."""
        return getattr(unwrapped(self.student), "_no_split_modules", None)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Micro-batches before the last one of a step. Replicas of a sharded student are not averaged yet; within a
        replica the gradient is reduced each time, since it would lie whole on every rank otherwise.
        """
        root = unwrapped(self.student)
        if not isinstance(root, FSDPModule):
            yield
            return
        root.set_requires_all_reduce(False)
        try:
            yield
        finally:
            root.set_requires_all_reduce(True)

    def finish_gradient(self) -> None:
        """After the last micro-batch of a step: averages adapters on a sharded student, which FSDP does not know."""
        if self.is_distributed_loading_by_transformers:
            average_gradients(self.student.parameters())

    def forward(
        self, batch: Any, row_scale: Tensor, uniform: Tensor, objective: Objective | LossPlan | FirstPass
    ) -> Any:
        """(loss, sums) of a batch: sum over its supervised rows of row_scale [n] * weight * divergence, by the terms of
        a plan where there is one; of a first pass what it asks for."""
        if isinstance(self, FSDPModule):  # accelerate has sharded what holds the student
            with at_work(self):
                head_whole(self.student)
                return self._forward(batch, row_scale, uniform, objective)
        return inside(self.student, partial(self._forward, batch, row_scale, uniform, objective))

    def _forward(
        self, batch: Any, row_scale: Tensor, uniform: Tensor, objective: Objective | LossPlan | FirstPass
    ) -> Any:
        first = objective if isinstance(objective, FirstPass) else None
        plan = objective.plan if isinstance(objective, FirstPass) else LossPlan.of(objective)
        chosen = supervised(batch)
        head = head_of(self.student)
        offload = self.offload and batch.input_ids.device.type != "cpu"
        with activations_offloaded(self.student) if offload else contextlib.nullcontext():
            hidden = hidden_rows(self.student, batch, chosen.position)  # [n, d]
        teacher = self.teacher(batch, chosen.position) if plan.teacher is None else plan.teacher
        here = Forward(
            hidden, head, teacher, chosen.labels, chosen.sequence, chosen.stream, uniform, self.options,
            of_stream=chosen.of_stream,
        )  # fmt: skip
        if first is not None:
            first.teacher = teacher
            return self._in_chunks(lambda here: first(here, row_scale), here, ())
        loss, sums = self._in_chunks(
            lambda here: weighted_sum(plan.terms(here), here, row_scale), here, plan.extras
        )
        if is_sharded(self.student) and torch.is_grad_enabled() and head.weight.requires_grad:
            loss = _Reaching.apply(loss, *(p for p in (head.weight, head.bias) if p is not None))
        return loss, {"kl": sums["divergence"], "row_kl": sums["row_divergence"]} | sums

    def _in_chunks(self, ask: Callable[[Forward], T], here: Forward, extras: Sequence[Extra]) -> T:
        """What is asked of a forward pass; where memory runs out, again with half the rows a chunk, which changes
        nothing but speed: what the extras had summed up by then is taken back.

        The smaller chunk stays for the steps to come.
        """
        before = [(one, one.state_dict()) for one in extras if isinstance(one, Stateful)]
        while True:
            try:
                return ask(replace(here, options=self.options))
            except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
                n, head = here.hidden.shape[0], here.head
                products, device = product_dtype(head.weight), here.hidden.device
                rows = self.options.chunk or chunk_rows(n, head.width, None, products, device)
                if not out_of_memory(error):
                    raise
                if rows == 1:
                    raise ResourceError(
                        f"no memory for one row of the loss: {error}. Use a smaller training.batch_size or "
                        "training.max_length, or a device with more memory."
                    ) from error
                self.options = replace(self.options, chunk=rows // 2)
                for extra, state in before:
                    extra.load_state_dict(state)
            _LOG.warning("out of memory in the loss; continuing with training.chunk = %d", self.options.chunk)


class _Reaching(torch.autograd.Function):
    """The loss, with a gradient of 0 for tensors that no row of it may reach.

    FSDP2 reduces the parts of a module that have a gradient: all ranks must agree on which those are.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *reached: Tensor) -> Tensor:
        ctx.like = reached
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(one.new_zeros(()).expand(one.shape) for one in ctx.like)
