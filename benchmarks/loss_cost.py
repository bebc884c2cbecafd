"""What a distillation loss costs on an accelerator by its shapes alone: floating-point operations and bytes, on paper.

    python benchmarks/loss_cost.py [--n 4096 8192] [--record]

n rows, v = 151,936 vocabulary, d / e student / teacher width, bf16 states and heads. No accelerator is measured here: a
product takes the longer of its operations at PEAK and its bytes at BANDWIDTH, everything else its bytes at BANDWIDTH.
over_products: the whole loss over the four products that a dense loss cannot do without (student logits, teacher
logits, dX, dW), each at once over all n rows.

selectkd: the kernels read both models' logits twice for the statistics, which a verifier's are among, and once for the
gradient, which they write over the student's. trl: TRL 1.16's kernel for a KL; it keeps no logits, makes fp32 ones
twice. trl_jsd: its Jensen-Shannon divergence, which makes them three times. Neither has verdicts. liger: Liger 0.8.5's
fused_linear_distillation, 1,024 rows a chunk, if its compiler needs no pass more than ours.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from record import Row, record

from selectkd.loss.by_device import ACCELERATOR_ROWS

BANDWIDTH, PEAK = 4.8e12, 790e12
"""Bytes and bf16 operations a second of an H200: the maker's bandwidth, and what large products reach."""
V = 151_936
SHAPES = {"qwen2.5-0.5b of 1.5b": (896, 1536), "1.5b of 7b": (1536, 3584), "2,048 of 4,096": (2048, 4096)}
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Cost:
    """Floating-point operations, bytes, and the seconds they take at least."""

    flops: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.moved + other.moved, self.seconds + other.seconds)


def product(m: int, k: int, n: int, *, out: int = BF16, left: int = BF16, adds: bool = False) -> Cost:
    """[m, k] [k, n], ``left`` and ``out`` bytes an entry of the first factor and of the result, which is read too where
    the product ``adds`` to it."""
    flops = 2.0 * m * k * n
    moved = float(left * m * k + BF16 * k * n + out * m * n * (2 if adds else 1))
    return Cost(flops, moved, max(flops / PEAK, moved / BANDWIDTH))


def passes(entries: float, size: float) -> Cost:
    """``size`` bytes for each of ``entries``."""
    return Cost(0.0, entries * size, entries * size / BANDWIDTH)


def products(n: int, d: int, e: int, v: int = V) -> Cost:
    """The four products over all rows at once."""
    return product(n, d, v) + product(n, e, v) + product(n, v, d) + product(v, n, d)


def chunks(n: int, rows: int) -> list[int]:
    """The rows of each chunk."""
    return [min(rows, n - start) for start in range(0, n, rows)]


def selectkd(n: int, d: int, e: int, v: int = V) -> Cost:
    """This package's loss with every output a verifier reads; several chunks' head gradient is summed in fp32."""
    cost, parts = Cost(), chunks(n, ACCELERATOR_ROWS)
    for index, c in enumerate(parts):
        cost += product(c, d, v) + product(c, e, v)
        cost += passes(c * v, STATISTICS_BYTES) + passes(c * v, GRADIENT_BYTES)
        cost += product(c, v, d) + product(v, c, d, out=BF16 if len(parts) == 1 else FP32, adds=index > 0)
    return cost if len(parts) == 1 else cost + passes(v * d, FP32 + BF16)


STATISTICS_BYTES = 2 * (BF16 + BF16)
"""Of the statistics kernel for each pair of logits: both models', twice."""
GRADIENT_BYTES = BF16 + BF16 + BF16
"""Of the gradient kernel: both models', and the gradient written over the student's."""


def trl(n: int, d: int, e: int, v: int = V, *, looks: int = 1) -> Cost:
    """TRL's loss in tiles of 4,096 rows and 32,768 columns, complete for each tile of the head: ``looks`` passes over
    the logits forward, each of which makes them, and one backward, its fp32 gradient rounded before the products."""
    cost = Cost()
    for c in chunks(n, 4096):
        for _ in range(looks + 1):
            cost += product(c, d, v, out=FP32) + product(c, e, v, out=FP32) + passes(c * v, FP32 + FP32)
        cost += passes(c * v, FP32 + FP32 + BF16)
        cost += product(c, v, d, out=FP32, adds=True) + product(v, c, d, out=FP32, adds=True)
    return cost


def liger(n: int, d: int, e: int, v: int = V) -> Cost:
    """Liger's loss in chunks of 1,024 rows, at best: the chunks' head gradients are made and then added in bf16."""
    cost = Cost()
    for c in chunks(n, 1024):
        cost += product(c, d, v) + product(c, e, v) + product(c, v, d) + product(v, c, d)
        cost += passes(c * v, STATISTICS_BYTES) + passes(c * v, GRADIENT_BYTES) + passes(v * d, 3 * BF16)
    return cost


LOSSES = {
    "selectkd": selectkd,
    "trl": trl,
    "trl_jsd": lambda n, d, e: trl(n, d, e, looks=2),
    "liger": liger,
}


def figures(n: int, d: int, e: int, name: str) -> dict[str, float]:
    """Of one loss: GFLOP and MB a token, ms for all rows, and the time over the bare products'."""
    cost = LOSSES[name](n, d, e)
    return {
        "gflop_a_token": cost.flops / n / 1e9,
        "mb_a_token": cost.moved / n / 1e6,
        "estimated_ms": 1e3 * cost.seconds,
        "estimated_over_products": cost.seconds / products(n, d, e).seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", nargs="+", type=int, default=[4096, 8192])
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    wanted = parser.parse_args()
    rows: list[Row] = []
    print(f"{'':24}{'n':>7} {'':10}{'GFLOP':>9}{'MB':>8}{'ms':>8}{'over products':>15}")
    for case, (d, e) in SHAPES.items():
        for n in wanted.n:
            for name in LOSSES:
                found = figures(n, d, e, name)
                print(f"{case:24}{n:7d} {name:10}" + "".join(
                    f"{value:{width}.2f}" for value, width in zip(found.values(), (9, 8, 8, 15), strict=True)
                ))  # fmt: skip
                rows += [(f"{case}, n {n}, v {V}", name, key, value, "", 1) for key, value in found.items()]
    if wanted.record:
        record("loss_cost (paper, no GPU measured)", rows)


if __name__ == "__main__":
    main()
