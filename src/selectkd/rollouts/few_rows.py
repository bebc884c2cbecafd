"""The products of a decoding step on a CPU: few rows, whole weights. b rows, d/o features in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

FEWEST, MOST = 8, 24
"""Rows for which the product the other way round is up to twice as fast; at 4 and at 64 there is no gain."""
SMALLEST = 2**19
"""Entries of a weight; below, the two ways take the same time. All three by ``benchmarks/generate.py --products``."""


class FewRows(TorchFunctionMode):
    """While it is entered, x W^T of few fp32 rows on a CPU is (W x^T)^T: the same sums by another kernel.

    The kernel rounds differently, so a result may differ in its last digits. Other functions are not touched.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is functional.linear and not kwargs and is_narrow(args[0], args[1]):
            return narrow_linear(*args)
        return func(*args, **(kwargs or {}))


def is_narrow(x: Tensor, weight: Tensor) -> bool:
    """Whether x [..., d] has so few rows, and weight [o, d] is so large, that the other way round pays."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and weight.dtype == torch.float32
        and FEWEST <= x.numel() // max(1, x.shape[-1]) <= MOST
        and weight.numel() >= SMALLEST
    )


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, [..., o], as (W x^T)^T."""
    product = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t()  # [b, o]
    if bias is not None:
        product = product + bias
    return product.reshape(*x.shape[:-1], weight.shape[0])
