"""What ``thin_rejected`` costs in variance and saves in products, on real states.

    python benchmarks/thinning.py [--n 512] [--draws 8] [--betas 0.01 0.1 0.5] [--record]

SmolLM2-135M-Instruct and its layers 0-9 and 20-29 on instructions, forward_kl, greedy top-k with k = 5, fp32. Thinned,
a rejected row is kept with probability beta at weight 1: the mean is the exact loss, and rows that are dropped cost no
gradient product.

deviation: ||dW - exact|| / ||exact||, dW the head's gradient, the root of its mean square over the draws. bias: the
same of the mean of the draws, which falls as deviation / sqrt(draws). masked: ||dW of beta 0 - exact|| / ||exact||,
what dropping all rejected rows costs for certain. kept: share of the rows with a gradient. time: process CPU time over
the exact loss's, in turn, the median of the draws. Needs what `make demo` fetches.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from loss import States, real_states
from record import record
from torch import Tensor

from selectkd import LiveRows, Objective, distillation_loss


def gradient(states: States, objective: Objective, uniform: Tensor) -> tuple[Tensor, float, float]:
    """dW, the share of rows with a weight, and the process time of the call."""
    started = time.process_time()
    hidden, head = (x.detach().requires_grad_() for x in (states.hidden, states.head))
    loss, seen = distillation_loss(
        hidden, head, LiveRows(states.teacher, states.teacher_head), objective, uniform
    )
    loss.backward()
    spent = time.process_time() - started
    assert head.grad is not None
    return head.grad, (seen["row_weight"] > 0).float().mean().item(), spent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--draws", type=int, default=8)
    parser.add_argument("--betas", nargs="+", type=float, default=[0.01, 0.1, 0.5])
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    states = real_states(wanted.n)
    none = torch.empty(wanted.n, 0)
    masked, _, _ = gradient(states, Objective(beta=0.0), none)
    print(f"{'beta':>6}{'deviation':>11}{'bias':>8}{'masked':>8}{'kept':>7}{'time':>7}")
    for beta in wanted.betas:
        true, _, _ = gradient(states, Objective(beta=beta), none)
        squares, ratios, total, shares = [], [], torch.zeros_like(true), []
        for draw in range(wanted.draws):
            generator = torch.Generator().manual_seed(draw)
            uniform = torch.rand(wanted.n, 1, generator=generator)
            _, _, exact = gradient(states, Objective(beta=beta), none)
            estimate, kept, thinned = gradient(states, Objective(beta=beta, thin_rejected=True), uniform)
            squares.append(((estimate - true).norm() / true.norm()).item() ** 2)
            total += estimate
            shares.append(kept)
            ratios.append(thinned / exact)
        figures = {
            "deviation": statistics.mean(squares) ** 0.5,
            "bias": ((total / wanted.draws - true).norm() / true.norm()).item(),
            "masked": ((masked - true).norm() / true.norm()).item(),
            "kept": statistics.mean(shares),
            "time": statistics.median(ratios),
        }
        print(
            f"{beta:>6}"
            + "".join(f"{x:>{w}.3f}" for x, w in zip(figures.values(), (11, 8, 8, 7, 7), strict=True))
        )
        if wanted.record:
            case = f"smollm2, real, n {wanted.n}, float32, forward_kl, greedy_topk, beta {beta}"
            rows = [(case, "selectkd", name, x, "", wanted.draws) for name, x in figures.items()]
            record("thinning", rows)


if __name__ == "__main__":
    sys.exit(main())
