"""The loss on a pretended GPU: its launches, its waits, its devices, and its way where no kernel can run."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

from gpu.launcher import pretended_with_kernels
from gpu.pretended import as_it_is, pretended
from selectkd import CachedRows, Head, LiveRows, Objective, distillation_loss, uniforms
from selectkd.loss import by_device
from selectkd.loss import chunks as chunked
from selectkd.loss.block_steps import BlockResult
from selectkd.loss.teacher_rows import TeacherRows

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
N, V, D = 10, 64, 8


@pytest.fixture(autouse=True)
def no_obstacle_known(monkeypatch):
    monkeypatch.setattr(by_device, "_OBSTACLES", {})
    by_device.obstacle_to_kernels.cache_clear()
    yield
    by_device.obstacle_to_kernels.cache_clear()


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loss_and_gradients(
    device: str, objective: Objective, *, dtype: torch.dtype = torch.float32, stored: int = 0, **options: Any
) -> list[torch.Tensor]:
    """Loss, gradients and columns of one call on a device, as CPU tensors."""
    hidden, weight = (drawn(rows, D, seed=rows, dtype=dtype).to(device).requires_grad_() for rows in (N, V))
    teacher: TeacherRows
    if stored:
        logp, ids = torch.log_softmax(drawn(N, V, seed=3), -1).topk(stored)
        teacher = CachedRows(ids.to(device), logp.to(device))
    else:
        teacher = LiveRows(
            drawn(N, D, seed=1, dtype=dtype).to(device), drawn(V, D, seed=2, dtype=dtype).to(device)
        )
    uniform = uniforms(N, objective.uniforms_per_token, seed=1, step=2).to(device)
    labels = (torch.arange(N) % V).to(device)
    loss, sums = distillation_loss(hidden, weight, teacher, objective, uniform, labels=labels, **options)
    loss.backward()
    assert hidden.grad is not None and hidden.grad.device == torch.device(device)
    found = [loss, hidden.grad, weight.grad, sums["row_weight"], sums["row_divergence"]]
    with as_it_is():
        return [x.detach().clone() for x in found]


def rows_in(chunk: int) -> Any:
    return mock.patch.object(by_device, "ACCELERATOR_LEAST_ROWS", chunk)


WAYS = {
    "kernels": (Objective("forward_kl", "greedy_topk", beta=0.1), {}),
    "kernels, a row in two not counted": (Objective("forward_kl", {"name": "greedy_topk", "k": 20}, beta=0.0), {}),
    "kernels, thinned": (Objective("reverse_kl", "greedy_topk", beta=0.4, thin_rejected=True), {}),
    "kernels, tokens always taken": (Objective("forward_kl", "greedy_topk", always_accept=(2, 5)), {}),
    "kernels at two temperatures": (
        Objective("generalized_jsd", "hellinger", beta=0.1), {"temperature": 2.0, "also_kl": True}
    ),
    "kernels after a first pass": (Objective("forward_kl", "se_kd", beta=0.1), {}),
    "kernels after scores were scaled": (Objective("forward_kl", "teachability", beta=0.1), {}),
    "a closed form": (Objective("adaptive_kl", "greedy_topk", beta=0.1), {}),
    "a verifier that draws": (Objective("forward_kl", "spec_k_literal", beta=0.1), {}),
    "a stored teacher": (Objective("forward_kl", {"name": "greedy_topk", "k": 3}, beta=0.1), {"stored": 8}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_no_way_through_the_loss_waits_for_the_device_and_each_gives_the_cpus_result(way):
    objective, options = WAYS[way]
    with pretended_with_kernels() as gpu:
        there = loss_and_gradients("cuda:0", objective, chunk=4, **options)
        waits = {line: n for line, n in gpu.waits().items()}
    assert not waits
    assert gpu.gradient.count == (3 if way.startswith("kernels") else 0)
    here = loss_and_gradients("cpu", objective, chunk=4, **options)
    for one, other in zip(there, here, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


def test_tensors_on_the_second_gpu_are_worked_on_there():
    with pretended_with_kernels(devices=2) as gpu:
        loss_and_gradients("cuda:1", Objective())
        assert gpu.current == 0 and set(gpu.launched_on) == {torch.device("cuda:1")}
        assert gpu.statistics.count == gpu.gradient.count == 1


def test_a_bias_is_looked_at_once_until_it_changes():
    with pretended_with_kernels() as gpu:
        head = Head(drawn(V, D, seed=1).cuda(), torch.zeros(V).cuda())
        teacher = LiveRows(drawn(N, D, seed=2).cuda(), drawn(V, D, seed=3).cuda())
        hidden = drawn(N, D, seed=4).cuda().requires_grad_()
        gpu.reset()
        for _ in range(3):
            distillation_loss(hidden, head, teacher, Objective(), chunk=5)
        assert sum(gpu.syncs.values()) == 1, gpu.report()
        head.bias.add_(1.0)
        distillation_loss(hidden, head, teacher, Objective(), chunk=5)
        assert sum(gpu.syncs.values()) == 2


class Counted:
    """Stands in for the kernels where only launches are counted: two launches a chunk, their small columns beside."""

    CannotLaunch = RuntimeError

    def __init__(self, gpu: Any) -> None:
        self.gpu = gpu

    def evaluate_chunk(self, raw: torch.Tensor, *_: Any) -> BlockResult:
        for name in ("statistics", "gradient"):
            self.gpu.launch(name, raw.device)
        with self.gpu.silence():
            one = self.gpu.put(torch.ones(raw.shape[0]), raw.device)
            number = self.gpu.put(torch.ones(()), raw.device)
        return BlockResult(one, one, one, one, number, number)


MOST = {
    ("forward_kl", "greedy_topk", 0): 150,
    ("adaptive_kl", "greedy_topk", 0): 4000,
    ("forward_kl", "greedy_topk", 64): 5000,
    ("forward_kl", "se_kd", 0): 1000,
    ("forward_kl", "prefix_gate", 0): 1500,
}
"""Launches of a loss over 4,096 rows at a vocabulary of 151,936, at most."""
QWEN, NARROW = 151_936, 128


@pytest.mark.parametrize(("divergence", "verifier", "stored"), MOST)
def test_a_loss_of_4096_rows_at_qwens_width_takes_few_launches(divergence, verifier, stored):
    n, dtype = 4096, torch.bfloat16
    most = MOST[divergence, verifier, stored]
    narrow = mock.patch.object(
        by_device, "ACCELERATOR_ENTRIES", by_device.ACCELERATOR_ENTRIES // QWEN * NARROW
    )
    with (
        pretended() as gpu,
        narrow,
        mock.patch.object(by_device, "accelerator_entries", lambda _: by_device.ACCELERATOR_ENTRIES),
    ):
        claims = by_device.kernels_for
        evaluated = Counted(gpu)
        stand_in = lambda *args, **kwargs: evaluated if claims(*args, **kwargs) is not None else None  # noqa: E731
        chunk = by_device.chunk_rows(n, QWEN, None, dtype, "cuda")
        assert chunk == 4096
        hidden, weight = (
            torch.zeros(rows, D, device="cuda", dtype=dtype).requires_grad_() for rows in (n, NARROW)
        )
        if stored:
            ids = torch.arange(stored).expand(n, -1).contiguous().cuda()
            teacher: TeacherRows = CachedRows(ids, torch.full((n, stored), -5.0, device="cuda"))
        else:
            teacher = LiveRows(hidden.detach(), weight.detach())
        with mock.patch.object(chunked, "kernels_for", stand_in):
            gpu.reset()
            distillation_loss(
                hidden, weight, teacher, Objective(divergence, verifier, beta=0.1), chunk=chunk // 2
            )[0].backward()
    assert 0 < gpu.launches <= most, gpu.report()
    assert not gpu.waits(), gpu.report()


def test_where_triton_cannot_build_a_kernel_the_loss_says_so_once_and_is_the_same():
    from selectkd.loss.block_triton import passes

    class Refuses:
        def __getitem__(self, grid: Any) -> Any:
            def launch(*_: Any, **__: Any) -> None:
                raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

            return launch

    with pretended(), mock.patch.object(passes, "statistics", Refuses()):
        with pytest.warns(UserWarning, match="Failed to find C compiler") as told:
            there = [
                loss_and_gradients("cuda:0", Objective("forward_kl", "spec_k"), chunk=4) for _ in range(2)
            ]
        assert len(told) == 1
    for one, other in zip(
        there[1], loss_and_gradients("cpu", Objective("forward_kl", "spec_k"), chunk=4), strict=True
    ):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    ("kind", "version", "reason"),
    [
        ("mps", "3.9.0", "on mps"),
        ("xpu", "3.9.0", "on xpu"),
        ("cuda", "3.2.0", "older than 3.3"),
        ("cuda", None, "not installed"),
    ],
)
def test_where_no_kernel_can_run_one_warning_says_why(kind, version, reason, monkeypatch):
    import triton

    if version is None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    else:
        monkeypatch.setattr(triton, "__version__", version)
    with pytest.warns(UserWarning, match=reason) as told:
        assert by_device.kernels_on(kind) is None and by_device.kernels_on(kind) is None
    assert len(told) == 1


def test_what_the_device_itself_reports_is_no_reason_to_do_without_kernels():
    from selectkd.loss.block_triton.launch import CannotLaunch, _or_cannot_launch

    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("Triton Error [CUDA]: an illegal memory access"),
    ):
        with pytest.raises(type(error)) as told, _or_cannot_launch():
            raise error
        assert not isinstance(told.value, CannotLaunch)


def test_rows_of_a_chunk_follow_an_accelerators_memory():
    def rows(free: int) -> int:
        with pretended(free=free):
            return by_device.chunk_rows(100_000, QWEN, None, torch.bfloat16, "cuda")

    assert [rows(gib << 30) for gib in (100, 40, 16, 6, 1)] == [4096, 4096, 2048, 1024, 256]
    assert by_device.chunk_rows(100_000, QWEN, None, torch.bfloat16) == 512  # a processor's


def test_a_narrow_heads_gradient_is_summed_in_fp32():
    objective = Objective("forward_kl", "always")
    with pretended_with_kernels():
        there = loss_and_gradients("cuda:0", objective, dtype=torch.bfloat16, chunk=1)[2]
        at_once = loss_and_gradients("cuda:0", objective, dtype=torch.bfloat16)[2]
    # ten chunks summed and rounded once: one unit apart from one product at most
    torch.testing.assert_close(there, at_once, atol=1e-6, rtol=2.0**-7)
