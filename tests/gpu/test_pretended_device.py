"""The pretended GPU refuses, counts and answers as CUDA does."""

from __future__ import annotations

import pytest
import torch

from gpu.pretended import Refused, as_it_is, pretended


def test_a_tensor_says_where_it_lies_and_its_views_and_results_with_it():
    with pretended(devices=2) as gpu:
        x = torch.arange(6.0, device="cuda:1")
        for y in (
            x,
            x[2:],
            x.view(2, 3),
            x + 1,
            x * torch.tensor(2.0),
            torch.zeros_like(x),
            x.new_ones(3),
            x.clone(),
        ):
            assert y.device == torch.device("cuda:1") and y.is_cuda
        assert x.cpu().device == torch.device("cpu") and not x.cpu().is_cuda
        assert torch.ones(2, device="cuda").device == torch.device("cuda:0")
        with torch.cuda.device(1):
            assert torch.ones(2, device="cuda").device == torch.device("cuda:1")
        assert gpu.current == 0
    assert torch.ones(2).device.type == "cpu"


REFUSED = {
    "an addition": lambda x: x + torch.ones(3),
    "a stack": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "a product": lambda x: x @ torch.ones(3),
    "an embedding": lambda x: torch.nn.functional.embedding(torch.tensor([0, 1]), x[:, None]),
    "another GPU's tensor": lambda x: x * torch.ones(3, device="cuda:1"),
    "a scatter of host values": lambda x: x.index_put_((torch.tensor([0]).cuda(),), torch.ones(1)),
    "numpy": lambda x: x.numpy(),
    "a GPU that is not there": lambda x: x.to("cuda:7"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cuda_refuses_is_refused(name):
    with pretended(devices=2):
        x = torch.ones(3, device="cuda")
        with pytest.raises((Refused, TypeError)):
            REFUSED[name](x)


WAITS = {
    "a number": lambda x: x.sum().item(),
    "a truth": lambda x: bool(x.any()),
    "a list": lambda x: x.tolist(),
    "places": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "a copy to the host": lambda x: x.cpu(),
    "numbers of the host": lambda x: torch.tensor([1.0, 2.0], device="cuda"),
    "a copy from the host": lambda x: torch.ones(3).to("cuda"),
    "a copy into a tensor": lambda x: x.copy_(torch.ones(3)),
}


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_for_the_device_is_counted(name):
    with pretended() as gpu:
        x = torch.ones(3, device="cuda")
        gpu.reset()
        WAITS[name](x)
    assert sum(gpu.syncs.values()) == 1, gpu.report()


FREE = {
    "arithmetic": lambda x: (x * 2).sum(),
    "a fill": lambda x: torch.full((3,), 2.0, device="cuda"),
    "a pinned copy": lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True),
    "a choice": lambda x: torch.where(x > 0, x, 0.0),
    "a cast": lambda x: x.to(torch.bfloat16).float(),
    "memory": lambda x: torch.empty(3, device="cuda"),
}


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_wait_is_not_counted_as_a_wait(name):
    with pretended() as gpu:
        x = torch.ones(3, device="cuda")
        gpu.reset()
        FREE[name](x)
        assert gpu.launches == (
            0 if name == "memory" else {"arithmetic": 2, "a choice": 2, "a cast": 2}.get(name, 1)
        )
    assert not gpu.syncs and not gpu.pageable, gpu.report()


def test_a_copy_without_waiting_from_pageable_memory_is_told_apart():
    with pretended() as gpu:
        torch.ones(3).to("cuda", non_blocking=True)
        torch.empty(3, pin_memory=True).to("cuda", non_blocking=True)
    assert sum(gpu.pageable.values()) == 1 and not gpu.syncs


def test_numbers_and_gradients_are_the_cpus():
    def trained(device):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
        data = torch.randn(5, 4).to(device)
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for _ in range(3):
            loss = model(data).square().mean()
            loss.backward()
            assert {p.grad.device.type for p in model.parameters()} == {device}
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        return loss

    with pretended() as gpu:
        there = trained("cuda")
        assert there.device.type == "cuda"
        with as_it_is():
            there = there.detach().clone()
        assert not gpu.waits()
    torch.testing.assert_close(there, trained("cpu"), atol=1e-6, rtol=1e-6)  # AdamW's many-tensor form


def test_a_gradient_goes_back_through_a_copy_and_a_custom_function_sees_the_device():
    seen = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            seen.append(gradient.device.type)
            return 2 * gradient

    with pretended():
        x = torch.ones(3, requires_grad=True)
        Twice.apply(x.to("cuda")).sum().backward()
        assert x.grad.device.type == "cpu" and seen == ["cuda"]
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_autocast_casts_products():
    with pretended(), torch.autocast("cuda", dtype=torch.bfloat16):
        x = torch.ones(3, 3, device="cuda")
        assert (x @ x).dtype == torch.bfloat16 and torch.is_autocast_enabled("cuda")


def test_lines_of_the_package_are_named():
    from selectkd import Objective, distillation_loss
    from selectkd.loss.teacher_rows import LiveRows

    with pretended() as gpu:
        teacher = LiveRows(torch.ones(2, 4, device="cuda"), torch.ones(9, 4, device="cuda"))
        hidden = torch.ones(2, 4, device="cuda", requires_grad=True)
        distillation_loss(hidden, torch.ones(9, 4, device="cuda"), teacher, Objective("taid"))
    assert any(event.where.startswith("loss/chunks.py:") for event in gpu.launched)
    assert set(gpu.launched_on) == {torch.device("cuda:0")}
