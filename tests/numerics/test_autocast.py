"""The loss under autocast: bf16 products, everything else in fp32."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selectkd import Head, LiveRows, Objective, distillation_loss
from selectkd.loss.token_log_probs import token_log_probs

N, V, D, E = 24, 300, 16, 12
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class Products(TorchDispatchMode):
    """Counts matrix products by the dtype of what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split("::")[1].split(".")[0] in PRODUCTS:
            self.dtypes[args[1].dtype] += 1
        return func(*args, **(kwargs or {}))


def case(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, LiveRows]:
    """(hidden, head, bias, teacher), the head already at bf16's numbers so that fp32 and bf16 read the same one."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(N, D, generator=generator).bfloat16().to(dtype).requires_grad_()
    head = torch.randn(V, D, generator=generator).bfloat16().to(dtype).requires_grad_()
    bias = torch.randn(V, generator=generator).requires_grad_()
    teacher = LiveRows(torch.randn(N, E, generator=generator), torch.randn(V, E, generator=generator))
    return hidden, head, bias, teacher


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype=dtype)


@pytest.mark.parametrize("judge", ["greedy_topk", "se_kd", "spec_k"])
@pytest.mark.parametrize("divergence", ["forward_kl", "adaptive_kl"])
def test_under_autocast_the_loss_is_the_one_of_a_bf16_head_and_the_gradients_are_fp32(divergence, judge):
    objective = Objective(divergence, judge)
    uniform = torch.rand(N, objective.uniforms_per_token, generator=torch.Generator().manual_seed(1))
    results = {}
    for name, dtype in (("autocast", torch.float32), ("bf16", torch.bfloat16)):
        hidden, head, bias, teacher = case(dtype)
        given = (hidden, Head(head, bias), teacher, objective, uniform)
        if name == "autocast":
            with autocast():
                loss, sums = distillation_loss(*given, chunk=8)
        else:
            loss, sums = distillation_loss(*given, chunk=8)
        loss.backward()
        results[name] = loss, sums, hidden.grad, head.grad, bias.grad
    loss, sums, *gradients = results["autocast"]
    plain, plain_sums, *plain_gradients = results["bf16"]
    assert loss.dtype == torch.float32 and torch.equal(loss, plain)
    for name, value in sums.items():
        assert torch.equal(value, plain_sums[name]), name
    for gradient, other in zip(gradients, plain_gradients, strict=True):
        assert gradient.dtype == torch.float32
        # the same products; the bf16 head's are rounded once more where they are summed
        assert (gradient - other).norm() <= 2**-8 * other.norm()


def test_every_product_with_the_students_head_is_in_autocasts_dtype():
    hidden, head, bias, teacher = case()
    with Products() as seen:
        with autocast():
            loss, _ = distillation_loss(hidden, Head(head, bias), teacher, Objective(), chunk=N)
        loss.backward()
    # logits, and the gradients of hidden states and head; the teacher's product is in its own dtype
    assert seen.dtypes == {torch.bfloat16: 3, torch.float32: 1}


def test_the_heads_gradient_is_summed_in_fp32_over_chunks():
    hidden, head, _, teacher = case()
    reference = [x.detach().double().requires_grad_() for x in (hidden, head)]
    loss, _ = distillation_loss(
        *reference, LiveRows(teacher.hidden.double(), teacher.head.weight.double()), Objective()
    )
    loss.backward()
    errors = {}
    for chunk in (1, N):
        hidden, head, _, teacher = case()
        with autocast():
            loss, _ = distillation_loss(hidden, head, teacher, Objective(), chunk=chunk)
        loss.backward()
        errors[chunk] = (head.grad - reference[1].grad).norm() / reference[1].grad.norm()
    # 24 chunks, each product rounded to bf16 once, are no worse than one (measured: .0106 and .0107)
    assert errors[1] <= 1.05 * errors[N]


def test_softmax_and_sums_stay_in_fp32_whatever_autocast_says():
    hidden, head, bias, teacher = case(torch.bfloat16)
    plain, _ = distillation_loss(hidden, Head(head, bias), teacher, Objective("adaptive_kl", "tip"))
    with autocast():
        under, _ = distillation_loss(hidden, Head(head, bias), teacher, Objective("adaptive_kl", "tip"))
    assert torch.equal(plain, under)


def test_fp16_autocast_leaves_the_heads_products_in_fp32():
    hidden, head, bias, teacher = case()
    plain, _ = distillation_loss(hidden, Head(head, bias), teacher, Objective())
    with autocast(torch.float16):
        under, _ = distillation_loss(hidden, Head(head, bias), teacher, Objective())
    assert torch.equal(plain, under)


def test_autocast_leaves_a_float64_head_alone():
    hidden, head, _, teacher = case(torch.float64)
    plain, _ = distillation_loss(hidden, head, teacher, Objective())
    with autocast():
        under, _ = distillation_loss(hidden, head, teacher, Objective())
    assert torch.equal(plain, under) and under.dtype == torch.float64


def test_log_probabilities_under_autocast_are_those_of_a_bf16_head():
    token = torch.arange(N)
    hidden, head, bias, _ = case()
    with Products() as seen:
        with autocast():
            under = token_log_probs(hidden, Head(head, bias), token)
        under.sum().backward()
    assert set(seen.dtypes) == {torch.bfloat16} and head.grad.dtype == torch.float32
    narrow, narrow_head, narrow_bias, _ = case(torch.bfloat16)
    assert torch.equal(under, token_log_probs(narrow, Head(narrow_head, narrow_bias), token))
