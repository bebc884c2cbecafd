"""What each training.precision does to a student: which weights one step moves, and where sixty steps lead.

    python benchmarks/precision.py moved [--rates 1e-6 1e-5 5e-5 1e-4 2e-4] [--record]
    python benchmarks/precision.py runs [--steps 60] [--seeds 3] [--layers 20] [--length 64] [--batch 2] [--record]
    python benchmarks/precision.py logits [--n 512] [--record]

The demo pair: SmolLM2-135M-Instruct and its outer layers, on instructions; full fine-tuning. Needs what
`make demo` fetches, and the root of the checkout as the working directory.

moved: the share of weights that AdamW's first step changes, from one gradient for each precision. runs: held-out KL of
recipes/demo.yaml with the same layers for all, over seeds. logits: bf16 products whose logits are rounded to bf16, or
kept in fp32 as `mm(out_dtype=float32)` does, both against fp32: rows whose best token or verdict changes, and the
error of the gradient.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from loss import real_states
from record import Row, record

from selectkd.config import load_recipe
from selectkd.models.precision import PRECISIONS
from selectkd.training.assembly import assemble
from selectkd.training.ledger import Ledger
from selectkd.training.run import train
from selectkd.training.step import DistillationModel

RECIPE = Path(__file__).parents[1] / "recipes" / "demo.yaml"
DEPTH = 30
NAMES = ("fp32", "bf16", "bf16-pure")


def recipe_of(folder: str, name: str, layers: int, samples: int, **training: Any) -> Any:
    """The demo's recipe in a precision, its layers fixed, so that nothing else differs."""
    kept = [*range(layers // 2), *range(DEPTH - (layers - layers // 2), DEPTH)]
    changed = {"output_dir": folder, "precision": name, "save_every": "null", **training}
    sets = [f"training.{key}={value}" for key, value in changed.items()]
    student = [f"student.from_teacher.layers={layers}", f"student.from_teacher.choose={kept}"]
    return load_recipe(RECIPE, [*student, f"data.sources.0.limit={samples}", *sets])


def moved(name: str, wanted: argparse.Namespace) -> list[float]:
    """The share of weights that one step at each learning rate changes."""
    length, rates = wanted.length, wanted.rates
    recipe = recipe_of(
        "unused",
        name,
        wanted.layers,
        40,
        max_length=length,
        max_prompt_length=length // 2,
        batch_size=wanted.batch,
    )
    made = assemble(recipe)
    model = DistillationModel(made.student, made.teacher)
    ledger = Ledger(made.objective, beta=made.beta, streams=made.streams)
    (micro_batch,) = ledger.begin([next(iter(made.micro_batches(0)))])
    with PRECISIONS[name].autocast("cpu"):
        loss, _ = model.train()(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.plan)
    loss.backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    shares = []
    for rate in rates:
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        optimizer.step()
        changed = sum(int((p != old).sum()) for p, old in zip(parameters, before, strict=True))
        shares.append(changed / sum(p.numel() for p in parameters))
        with torch.no_grad():
            for parameter, old in zip(parameters, before, strict=True):
                parameter.copy_(old)
        del optimizer
        gc.collect()
    return shares


def held_out_kl(name: str, seed: int, wanted: argparse.Namespace) -> tuple[float, float]:
    """Held-out KL of a run, before and after."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(
            f"{folder}/run", name, wanted.layers, wanted.samples, seed=seed, max_steps=wanted.steps,
            max_length=wanted.length, max_prompt_length=wanted.length // 2, batch_size=wanted.batch,
            learning_rate=wanted.rate, evaluate_every="null", probe_samples=1,
        )  # fmt: skip
        result = train(recipe)
    assert result.before is not None and result.after is not None
    return result.before.kl, result.after.kl


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["moved", "runs", "logits"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-6, 1e-5, 5e-5, 1e-4, 2e-4])
    parser.add_argument("--rate", type=float, default=2e-4, help="learning rate of the runs")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=20, help="of the student, of the teacher's 30")
    parser.add_argument("--samples", type=int, default=600)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--names", nargs="+", default=list(NAMES), choices=list(PRECISIONS))
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    wanted = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"moved": of_moved, "runs": of_runs, "logits": of_logits}
    for row in ways[wanted.what](wanted):
        case, of, metric, value, spread, _ = row
        print(f"{case:<40}{of:<20}{metric:<30}{value:>10.5g}  {spread}", flush=True)
        if wanted.record:  # at once: a long benchmark that is stopped keeps what it has measured
            record("precision", [row])


def of_moved(wanted: argparse.Namespace) -> Iterator[Row]:
    """Rows of one step in each precision, at each learning rate."""
    for name in wanted.names:
        for rate, share in zip(wanted.rates, moved(name, wanted), strict=True):
            yield f"one step, lr {rate:g}", name, "share of weights moved", share, "", 1


def of_runs(wanted: argparse.Namespace) -> Iterator[Row]:
    """Rows of each run as it ends; then of each precision, the mean over seeds and the spread from least to most."""
    case = f"{wanted.steps} steps, {wanted.layers} layers, lr {wanted.rate:g}"
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in wanted.names}
    for seed in range(42, 42 + wanted.seeds):
        for name in wanted.names:
            before, after = held_out_kl(name, seed, wanted)
            seen[name].append((before, after))
            yield f"{case}, seed {seed}", name, "kl before", before, "", 1
            yield f"{case}, seed {seed}", name, "kl", after, "", 1
    for name, pairs_of in seen.items():
        for metric, values in zip(("kl before", "kl"), zip(*pairs_of, strict=True), strict=True):
            yield case, name, metric, statistics.mean(values), max(values) - min(values), wanted.seeds


def of_logits(wanted: argparse.Namespace) -> list[Row]:
    """Rows that say what rounding logits to bf16 costs beside products of the same bf16 states in fp32."""
    states = real_states(wanted.n)
    exact = [(x.double() @ w.double().t()).float() for x, w in pairs(states)]
    largest = exact[0].abs().amax(-1).mean().item()
    found: list[Row] = [("logits", "student", "largest logit of a row, mean", largest, "", 1)]
    wide = [x.bfloat16().float() @ w.bfloat16().float().t() for x, w in pairs(states)]
    ways = {"bf16, fp32 logits": wide, "bf16, bf16 logits": [z.bfloat16().float() for z in wide]}
    best, judged, slope = looked_at(*exact)
    for name, logits in ways.items():
        top, verdict, gradient = looked_at(*logits)
        found += [
            ("logits", name, "best token changed", (top != best).float().mean().item(), "", 1),
            ("logits", name, "verdict changed", (verdict != judged).float().mean().item(), "", 1),
            ("logits", name, "gradient error", ((gradient - slope).norm() / slope.norm()).item(), "", 1),
        ]
    return found


def pairs(states: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(states.hidden, states.head), (states.teacher, states.teacher_head)]


def looked_at(
    student: torch.Tensor, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The student's best token [n], greedy top-5's verdict [n], and forward KL's gradient to the logits [n, v]."""
    top = student.argmax(-1)
    judged = (teacher > teacher.gather(-1, top[:, None])).sum(-1) < 5
    return top, judged, student.softmax(-1) - teacher.softmax(-1)


if __name__ == "__main__":
    main()
