"""What reaches the fused loss from outside: a factor of the loss, a loss scaler, torch.compile, a second derivative."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from selectkd import LiveRows, Objective, distillation_loss, uniforms
from selectkd.errors import ConfigError
from selectkd.loss.token_log_probs import token_log_probs

N, V, D = 64, 97, 16
PLAIN = Objective("forward_kl", "always", beta=1.0)


def tensors(dtype: torch.dtype, hidden_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, LiveRows]:
    generator = torch.Generator().manual_seed(0)
    hidden, head, theirs, teacher = (
        torch.randn(*size, generator=generator) for size in ((N, D), (V, D), (N, D), (V, D))
    )
    hidden, head = hidden.to(hidden_dtype or dtype), head.to(dtype)
    return hidden.requires_grad_(), head.requires_grad_(), LiveRows(theirs.to(dtype), teacher.to(dtype))


def gradients(factor: float, dtype: torch.dtype, hidden_dtype: torch.dtype | None = None) -> list[Tensor]:
    hidden, head, teacher = tensors(dtype, hidden_dtype)
    (distillation_loss(hidden, head, teacher, PLAIN)[0] * factor).backward()
    return [hidden.grad, head.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("factor", [1 / 3, 1 / 7, 0.1])
def test_a_factor_of_the_loss_makes_no_gradient_in_bf16_larger_or_smaller_on_the_whole(factor: float) -> None:
    for whole, part in zip(gradients(1.0, torch.bfloat16), gradients(factor, torch.bfloat16), strict=True):
        ratio = (part.double() * whole.double()).sum() / whole.double().square().sum() / factor
        # roundings of 2^-9 each way, some 1,000 entries: 2^-9 / sqrt(1000) = 6e-5; a rounded factor is off by 1e-3
        assert abs(ratio.item() - 1.0) < 3e-4
        exact = whole.double() * factor
        assert bool(((part.double() - exact).abs() <= 2.0**-8 * exact.abs()).all())  # one rounding more


def test_a_factor_of_a_loss_in_bf16_errs_no_more_than_in_the_plain_program() -> None:
    hidden, head, teacher = tensors(torch.bfloat16)
    logp = torch.log_softmax((teacher.hidden @ teacher.head.weight.t()).float(), -1)
    logq = torch.log_softmax((hidden @ head.t()).float(), -1)
    kl = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="batchmean")
    plain = torch.autograd.grad(kl / 3, (hidden, head))
    wide, of_head, theirs = (x.detach().double() for x in (hidden, head, teacher.hidden))
    wide.requires_grad_(), of_head.requires_grad_()
    exact = torch.autograd.grad(
        distillation_loss(wide, of_head, LiveRows(theirs, teacher.head.weight.double()), PLAIN)[0] / 3,
        (wide, of_head),
    )
    for ours, other, truth in zip(gradients(1 / 3, torch.bfloat16), plain, exact, strict=True):
        assert (ours.double() - truth).norm() <= 1.05 * (other.double() - truth).norm()


def test_hidden_states_in_fp16_bear_the_factor_of_a_loss_scaler() -> None:
    scale = 2.0**16
    whole, scaled = (gradients(one, torch.float32, torch.float16) for one in (1.0, scale))
    assert scaled[0].dtype == torch.float16 and bool(scaled[0].isfinite().all())
    exact = gradients(1.0, torch.float32)[0]  # of hidden states that were not rounded to fp16
    torch.testing.assert_close(scaled[0].double() / scale, exact.double(), rtol=2e-2, atol=2e-5)
    torch.testing.assert_close(scaled[1] / scale, whole[1])


def test_a_head_in_fp16_is_refused_with_what_would_work() -> None:
    hidden, head, teacher = tensors(torch.float16)
    with pytest.raises(ConfigError, match="float32 or bfloat16"):
        distillation_loss(hidden, head, teacher, PLAIN)


def test_a_second_derivative_is_refused_and_not_silently_left_out() -> None:
    hidden, head, teacher = tensors(torch.float32)
    loss = distillation_loss(hidden, head, teacher, PLAIN)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss + hidden.square().sum(), hidden, create_graph=True)
    log_probs = token_log_probs(hidden, head, torch.arange(N))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(log_probs.sum(), hidden, create_graph=True)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor:UserWarning"
)  # dynamo looks at every tensor's
def test_torch_compile_around_the_loss_breaks_its_graph_and_changes_nothing() -> None:
    objective = Objective("forward_kl", {"name": "spec_k", "k": 2}, beta=0.1)
    uniform = uniforms(N, 1, seed=1, step=1)

    def step(hidden: Tensor, head: Tensor) -> Tensor:
        return distillation_loss(hidden * 2.0, head, teacher, objective, uniform)[0] * 3.0

    hidden, head, teacher = tensors(torch.float32)
    plain = step(hidden, head)
    traced = torch.compile(step, backend="eager")(hidden, head)
    assert traced.item() == plain.item()
    for ours, theirs in zip(*(torch.autograd.grad(x, (hidden, head)) for x in (traced, plain)), strict=True):
        assert torch.equal(ours, theirs)
