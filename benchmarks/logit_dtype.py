"""What bf16 logits of a bf16 model cost against fp32 ones: verdicts, divergence and gradient, on the CPU.

    python benchmarks/logit_dtype.py [--n 256] [--real] [--record]

n rows. States and heads are bf16 in either case; fp32 logits are what a product with ``out_dtype`` writes, bf16 logits
are those rounded once. Both are compared with the same states' fp64 program, forward_kl and greedy top-k with k = 5.
Random states are those of loss.py at SmolLM2's width. --real takes
SmolLM2 and its layers 0-9 and 20-29 on instructions instead (needs what `make demo` fetches).

argmax, verdict: share of rows whose proposal, or whose verdict on it, differs from the fp64 program's. kl_error:
|mean KL - fp64| / fp64. gradient_error: ||dX - fp64|| / ||fp64||, dX of the loss with beta 0.1. tar: share accepted
minus the fp64 program's. The gradient of the logits is rounded to bf16 before its products in both cases.

bytes, of a pair of logits through the whole loss on an accelerator (loss_cost.py): 22 with bf16 logits, 40 with fp32.
"""

from __future__ import annotations

import argparse

import torch
from loss import SHAPES, States, random_states, real_states
from record import Row, record
from torch import Tensor

K, BETA = 5, 0.1
BLOCK = 32


def judged(zs: Tensor, zt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The proposal, its verdict, KL(p || q) and the gradient of the weighted loss to the logits, of finished logits."""
    logq, logp = torch.log_softmax(zs, -1), torch.log_softmax(zt, -1)
    top = zs.argmax(-1)
    accepted = (zt > zt.gather(-1, top[:, None])).sum(-1) < K
    p, q = logp.exp(), logq.exp()
    weight = torch.where(accepted, 1.0, BETA).to(zs.dtype)
    return top, accepted, (p * (logp - logq)).sum(-1), weight[:, None] * (q - p)


def compared(states: States) -> dict[str, dict[str, float]]:
    """The figures of bf16 and of fp32 logits."""
    narrow = states.to(torch.bfloat16)
    sums: dict[str, dict[str, float]] = {name: {} for name in ("bf16", "fp32")}
    n = narrow.hidden.shape[0]
    exact_kl, exact_norm = 0.0, 0.0
    for start in range(0, n, BLOCK):
        hidden, teacher = (x[start : start + BLOCK].double() for x in (narrow.hidden, narrow.teacher))
        head, teacher_head = narrow.head.double(), narrow.teacher_head.double()
        zs, zt = hidden @ head.t(), teacher @ teacher_head.t()
        top, accepted, kl, gradient = judged(zs, zt)
        true = gradient @ head
        exact_kl, exact_norm = exact_kl + kl.sum().item(), exact_norm + true.square().sum().item()
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            found = judged(zs.to(dtype).float(), zt.to(dtype).float())
            rounded = found[3].to(torch.bfloat16).double() @ head
            figures = {
                "argmax": (found[0] != top).sum().item() / n,
                "verdict": (found[1] != accepted).sum().item() / n,
                "tar": (found[1].sum() - accepted.sum()).item() / n,
                "kl_error": found[2].sum().item(),
                "gradient_error": (rounded - true).square().sum().item(),
            }
            for key, value in figures.items():
                sums[name][key] = sums[name].get(key, 0.0) + value
    for figures in sums.values():
        figures["kl_error"] = abs(figures["kl_error"] - exact_kl) / exact_kl
        figures["gradient_error"] = (figures["gradient_error"] / exact_norm) ** 0.5
    return sums


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=256)
    parser.add_argument("--real", action="store_true", help="SmolLM2 on instructions")
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    states = real_states(wanted.n) if wanted.real else random_states(SHAPES["smollm2"], wanted.n)
    highest = (states.hidden[:BLOCK] @ states.head.t()).max().item()
    case = (
        f"{'smollm2, real' if wanted.real else 'smollm2, random'}, n {wanted.n}, largest logit {highest:.0f}"
    )
    rows: list[Row] = []
    for name, figures in compared(states).items():
        print(f"{case}, {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in figures.items()))
        rows += [(case, f"{name} logits", key, value, "", 1) for key, value in figures.items()]
    if wanted.record:
        record("logit_dtype", rows)


if __name__ == "__main__":
    main()
