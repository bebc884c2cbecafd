"""Which gates find the positions where a damaged teacher of the laboratory is wrong, before any training.

    python benchmarks/lab_noise_found.py [--teacher teacher-1M-wrong] [--student student-0.2M] [--record]

A gate finds a position that it rejects. precision: the share of a gate's rejected weight that lies on wrong positions;
recall: the share of the wrong positions' weight that it rejects. Means over the warm students of all seeds, with
Student's t intervals; a gate that rejects at random has the share of wrong positions for its precision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lab_text
import torch
from lab_models import LENGTH
from record import record
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.data.supervised import supervised
from selectkd.evals.statistics import t_interval
from selectkd.objective.pair import dense_pair
from selectkd.objective.registry import build
from selectkd.objective.verifiers import VERIFIERS

STUDIES = Path(__file__).parents[1] / "studies"
GATES = {
    "greedy_topk, k 1": {"name": "greedy_topk", "k": 1},
    "greedy_topk, k 5": {"name": "greedy_topk", "k": 5},
    "expected_spec_k, k 1": {"name": "expected_spec_k", "k": 1},
    "expected_spec_k, k 5": {"name": "expected_spec_k", "k": 5},
    "teacher_entropy, 1 nat": {"name": "teacher_entropy", "max": 1.0},
    "teacher_entropy, 2 nats": {"name": "teacher_entropy", "max": 2.0},
    "label_top_k, k 5": {"name": "label_top_k", "k": 5},
    "matched_random, rate .5": {"name": "matched_random", "rate": 0.5},
}


def found(folder: Path, teacher: str, student: Path) -> dict[str, tuple[float, float]]:
    """(precision, recall) of every gate, for one student."""
    sys.path.insert(0, str(STUDIES))
    from lab_noise import right_places

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    examples = []
    for one in lab_text.read(folder / "heldout.jsonl"):
        prompt, text = (tokenizer(one[key])["input_ids"] for key in ("prompt", "completion"))
        ids = [*prompt, *text, tokenizer.eos_token_id][:LENGTH]
        examples.append(Example(ids, [at >= len(prompt) for at in range(len(ids))]))
    batch = collate(examples, pad_id=tokenizer.pad_token_id)
    seen = supervised(batch)
    logs = []
    for path in (folder / teacher, student):
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        with torch.no_grad():
            hidden = model.model(**batch.model_inputs()).last_hidden_state
            logs.append(model.lm_head(hidden.flatten(0, 1)[seen.position]).log_softmax(-1))  # [n, v]
    pair = replace(dense_pair(*logs), label=seen.labels, sequence=seen.sequence)
    uniform = torch.rand(len(seen.labels), 8, generator=torch.Generator().manual_seed(0))

    def rejected(verifier: Any) -> torch.Tensor:
        return 1.0 - build(VERIFIERS, verifier, kind="verifier")(pair, uniform)

    wrong = rejected(right_places(str(folder / "noise.json")))
    shares = {}
    for name, gate in GATES.items():
        weight = rejected(gate)
        both = float((weight * wrong).sum())
        shares[name] = (both / max(float(weight.sum()), 1e-12), both / float(wrong.sum()))
    shares["all positions"] = (float(wrong.mean()), 1.0)
    return shares


def main(arguments: Sequence[str]) -> int:
    """Prints the table; with --record its rows go to results.csv."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path(".cache/lab/code"))
    parser.add_argument("--teacher", default="teacher-1M-wrong")
    parser.add_argument("--student", default="student-0.2M")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args(arguments)
    disable_progress_bar()
    students = sorted(given.folder.glob(f"{given.student}-s*"))
    every = [found(given.folder, given.teacher, student) for student in students]
    rows = []
    for name in every[0]:
        told = []
        for place, metric in enumerate(("precision", "recall")):
            one = t_interval([seen[name][place] for seen in every])
            told.append(f"{metric} {one.value:.3f} [{one.low:.3f}, {one.high:.3f}]")
            rows.append(
                (
                    f"{given.teacher}, {given.student}",
                    name,
                    metric,
                    one.value,
                    f"{one.low:.3g}..{one.high:.3g}",
                    one.n,
                )
            )
        print(f"{name}: {', '.join(told)}")
    if given.record:
        record("noise_found", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
