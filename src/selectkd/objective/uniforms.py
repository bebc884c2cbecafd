"""Counter-based uniform numbers: a verdict depends on (seed, step, rank, micro-batch, row), not on how rows are cut."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    """A 64-bit pattern as the int64 torch stores it in."""
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _scramble(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on int64."""
    x = (x ^ _shift(x, 30)) * _signed(_MIX_1)
    x = (x ^ _shift(x, 27)) * _signed(_MIX_2)
    return x ^ _shift(x, 31)


def uniforms(
    n: int,
    r: int,
    *,
    seed: int,
    step: int,
    rank: int = 0,
    micro: int = 0,
    counter: Int[Tensor, " n"] | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "n r"]:
    """n x r numbers uniform in (0, 1), fp32, a pure function of the arguments: [n, r].

    ``counter`` [n] names the rows (default 0 ... n - 1), so that packing or resharding can keep a row's numbers.

    >>> a = uniforms(4, 2, seed=1, step=7)
    >>> bool((a[2:] == uniforms(2, 2, seed=1, step=7, counter=torch.tensor([2, 3]))).all())
    True
    """
    key = torch.zeros((), dtype=torch.int64, device=device)
    for word in (seed, step, rank, micro):
        key = _scramble(key + _signed(word * _GOLDEN + _GOLDEN))
    rows = torch.arange(n, device=device) if counter is None else counter.to(device=device, dtype=torch.int64)
    cell = _scramble(key ^ _scramble(rows * _signed(_GOLDEN) + 1))[:, None]  # [n, 1]
    columns = torch.arange(1, r + 1, device=device)[None, :]  # [1, r]
    bits = _shift(_scramble(cell + columns * _signed(_GOLDEN)), 40)  # 24 bits: all that fp32 keeps
    # the largest sum, 2^24 - .5, has no place in fp32 and would be rounded to 1
    return ((bits.to(torch.float32) + 0.5) / float(1 << 24)).clamp_(max=1.0 - 2.0**-24)
