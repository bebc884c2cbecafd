"""An allocation that fails in the loss halves the chunk and keeps the value."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selectkd import Objective
from selectkd.data.supervised import supervised
from selectkd.errors import ResourceError
from selectkd.loss.extras.adaptive_alpha import adaptive_alpha
from selectkd.loss.options import LossOptions
from selectkd.loss.plan import LossPlan, StreamLoss
from selectkd.teachers.live import LiveTeacher
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts, tiny_llama


class Short(TorchDispatchMode):
    """A machine on which e^z of no more than ``rows`` rows fits."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.rows, self.failures = rows, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "aten.exp" in str(func) and args[0].ndim == 2 and args[0].shape[0] > self.rows:
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory (injected)")
        return func(*args, **(kwargs or {}))


def step(rows: int | None, chunk: int | None = None) -> tuple[float, torch.Tensor, DistillationModel, int]:
    model = DistillationModel(tiny_llama(2), LiveTeacher(tiny_llama(1)), options=LossOptions(chunk=chunk))
    batch = padded(texts(6), 6)[0]
    n = len(supervised(batch))
    given = (batch, torch.full((n,), 1 / n), torch.empty(n, 0), Objective("forward_kl", "greedy_topk"))
    if rows is None:
        loss, _ = model(*given)
        failures = 0
    else:
        with Short(rows) as machine:
            loss, _ = model(*given)
        failures = machine.failures
    loss.backward()
    return loss.item(), model.student.get_output_embeddings().weight.grad, model, failures


def test_an_allocation_that_fails_halves_the_chunk_and_keeps_the_value():
    plain, gradient, _, _ = step(None)
    short, short_gradient, model, failures = step(5)
    assert failures >= 1 and model.options.chunk is not None and model.options.chunk <= 5
    assert short == pytest.approx(plain, rel=1e-6)
    torch.testing.assert_close(short_gradient, gradient, atol=1e-6, rtol=1e-5)


def test_no_memory_at_all_says_what_would_help():
    with pytest.raises(ResourceError, match="batch_size"):
        step(0)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    model = DistillationModel(tiny_llama(2), LiveTeacher(tiny_llama(1, hidden=16)))
    model.teacher.head = LiveTeacher(tiny_llama(1)).head  # of another width than the hidden states
    batch = padded(texts(2), 2)[0]
    n = len(supervised(batch))
    with pytest.raises(ValueError, match="hidden states"):
        model(batch, torch.ones(n), torch.empty(n, 0), Objective())


class ShortAfter(TorchDispatchMode):
    """A machine whose memory ends once, after ``extra`` has summed something up."""

    def __init__(self, extra: adaptive_alpha) -> None:
        super().__init__()
        self.extra, self.failures = extra, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.failures and self.extra.sums["skew_kl"][1] and "aten.mm" in str(func):
            self.failures += 1
            raise torch.OutOfMemoryError("out of memory (injected)")
        return func(*args, **(kwargs or {}))


def test_a_loss_that_is_tried_again_sums_up_what_its_extras_see_once() -> None:
    batch = padded(texts(6), 6)[0]
    n = len(supervised(batch))
    sums = []
    for fails in (False, True):
        extra = adaptive_alpha()
        plan = LossPlan((StreamLoss(Objective({"name": "skew_kl", "alpha": 0.1}, "always")),), [extra])
        model = DistillationModel(tiny_llama(2), LiveTeacher(tiny_llama(1)))
        machine = ShortAfter(extra)
        with machine if fails else contextlib.nullcontext():
            model(batch, torch.full((n,), 1 / n), torch.empty(n, 0), plan)
        assert machine.failures == fails
        sums.append(extra.sums["skew_kl"])
    assert sums[0] == pytest.approx(sums[1]) and sums[0][1] == 6
