"""The head's gradient summed over chunks in the head's own dtype is as exact as a sum in fp32."""

from __future__ import annotations

import pytest
import torch

from selectkd.loss.products import HeadGradient

V, D, C = 300, 16, 8


@pytest.mark.parametrize("products", [1, 2, 3, 40])
def test_a_bf16_sum_is_no_worse_than_one_in_fp32_rounded_at_the_end(products):
    generator = torch.Generator().manual_seed(products)
    weight = torch.empty(V + 5, D, dtype=torch.bfloat16)  # five rows beyond the shared vocabulary
    ours = HeadGradient(weight, V, products)
    in_fp32, exact = torch.zeros(V, D), torch.zeros(V, D, dtype=torch.float64)
    for _ in range(products):
        gradient = torch.randn(C, V, generator=generator).bfloat16()
        inputs = torch.randn(C, D, generator=generator).bfloat16()
        ours.add(gradient, inputs, None)
        in_fp32 += gradient.t() @ inputs
        exact += gradient.t().double() @ inputs.double()
    error = (ours.total[:V].double() - exact).norm()
    assert error <= 1.05 * (in_fp32.bfloat16().double() - exact).norm()
    assert ours.total.dtype == torch.bfloat16 and not ours.total[V:].any()
    assert (ours.rest is None) == (products <= 2)


def test_a_plain_bf16_sum_would_be_worse():
    generator = torch.Generator().manual_seed(0)
    total, exact = torch.zeros(V, D, dtype=torch.bfloat16), torch.zeros(V, D, dtype=torch.float64)
    ours = HeadGradient(total, V, 40)
    for _ in range(40):
        gradient, inputs = (torch.randn(C, w, generator=generator).bfloat16() for w in (V, D))
        ours.add(gradient, inputs, None)
        total += gradient.t() @ inputs
        exact += gradient.t().double() @ inputs.double()
    assert (total.double() - exact).norm() > 1.5 * (ours.total.double() - exact).norm()
