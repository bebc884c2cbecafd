"""Training curves with and without ``gradient_filter`` on the demo's teacher, seed by seed.

Plain forward KL on all weights of a cut of SmolLM2, so that filtering reaches dX and dW. Every seed trains once dense
and once with each filter, from the same start, on the same batches; held-out KL is looked at along the way. What counts
is the difference to the dense run of the same seed, beside what another seed changes.

    python benchmarks/filtering.py [--seeds 5] [--steps 12] [--dtype float32] [--filters 0.000977] [--record]
    python benchmarks/filtering.py --errors [--filters 6.1e-5 0.000977] [--record]

--errors: no runs; relative errors of dX and dW on the real states of benchmarks/loss.py, filtered, in fp32 and bf16,
beside the plain program in bf16, each against fp64 on the same rounded states.

Needs what `make demo` fetches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import torch
from first_comparison import recipe_for
from loss import States, differentiated, plain, real_states, selectkd
from record import Row, record

from selectkd.training.run import train


def curve(gradient_filter: float, *, seed: int, steps: int, dtype: str) -> dict[int, float]:
    """Held-out KL by step of one run."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_for(
            folder, "warm", limit=200, evaluation=0.08, dtype=dtype, objective={"verifier": "always"},
            seed=seed, max_steps=steps, evaluate_every=max(1, steps // 3), gradient_filter=gradient_filter,
        )  # fmt: skip
        train(recipe)
        lines = (Path(folder) / "run/metrics.jsonl").read_text("utf-8").splitlines()
    looks = [line for line in map(json.loads, lines) if "evaluation" in line]
    return {look["step"]: look["evaluation"]["kl"] for look in looks}


def errors(filters: list[float]) -> list[Row]:
    """Rows of the relative errors of dX and dW."""
    rows: list[Row] = []
    master = real_states(256)
    for dtype in (torch.bfloat16, torch.float32):
        states = master.to(dtype)
        truth = differentiated(plain(States, "forward_kl"))(states.to(torch.float64))[1:]
        ways = {"plain": plain(States, "forward_kl")} if dtype == torch.bfloat16 else {}
        for share in (0.0, *filters):
            ways[f"gradient_filter {share:.3g}"] = selectkd(States, "forward_kl", "greedy_topk", share)
        for name, way in ways.items():
            found = differentiated(way)(states)[1:]
            for metric, ours, exact in zip(("dX", "dW"), found, truth, strict=True):
                error = ((ours.double() - exact).norm() / exact.norm()).item()
                rows.append(
                    (
                        f"smollm2, real, n 256, {dtype}".replace("torch.", ""),
                        name,
                        f"error of {metric}",
                        error,
                        "",
                        1,
                    )
                )
                print(*rows[-1][:4], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--filters", type=float, nargs="+", default=[2**-10])
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    parser.add_argument("--errors", action="store_true", help="errors of the gradients on real states")
    wanted = parser.parse_args()
    if wanted.errors:
        torch.set_num_threads(1)
        rows = errors(wanted.filters)
        if wanted.record:
            record("filtering", rows)
        return
    seen: dict[float, list[dict[int, float]]] = {x: [] for x in (0.0, *wanted.filters)}
    for i in range(wanted.seeds):
        for gradient_filter, curves in seen.items():
            curves.append(curve(gradient_filter, seed=42 + i, steps=wanted.steps, dtype=wanted.dtype))
            shown = {step: round(kl, 5) for step, kl in curves[-1].items()}
            print(f"seed {42 + i}, filter {gradient_filter:g}: {shown}", flush=True)
    rows = []
    for gradient_filter in wanted.filters:
        for step in seen[0.0][0]:
            dense = [one[step] for one in seen[0.0]]
            gaps = [one[step] - kl for one, kl in zip(seen[gradient_filter], dense, strict=True)]
            noise = statistics.stdev(dense) if len(dense) > 1 else float("nan")
            print(
                f"filter {gradient_filter:g}, step {step}: dense {statistics.mean(dense):.5f}, difference "
                f"{statistics.mean(gaps):+.5f}, largest {max(map(abs, gaps)):.5f}; seeds' deviation {noise:.5f}"
            )
            case = f"warm, {wanted.dtype}, step {step} of {wanted.steps}"
            name = f"gradient_filter {gradient_filter:.3g}"
            rows += [
                (case, "dense", "held-out KL", statistics.mean(dense), noise, wanted.seeds),
                (case, name, "difference", statistics.mean(gaps), max(gaps) - min(gaps), wanted.seeds),
            ]
    if wanted.record:
        record("filtering", rows)


if __name__ == "__main__":
    main()
