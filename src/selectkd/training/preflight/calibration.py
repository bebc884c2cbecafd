"""How sure the models of a pair are of a text, and how often they are right. n supervised rows of the probe batch."""

from __future__ import annotations

import torch
from torch import Tensor

from selectkd.data.supervised import supervised
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import LiveRows
from selectkd.models.forward import hidden_rows
from selectkd.models.head import head_of
from selectkd.models.sharded import inside
from selectkd.training.assembly import Assembly
from selectkd.training.heldout.evaluation import negative_log_likelihood

BINS = 10


@torch.no_grad()
def calibration(assembly: Assembly) -> str:
    """For each model: perplexity of the text, and the gap between how sure it is and how often it is right."""
    chosen = supervised(assembly.probe)
    assembly.student.eval()

    def calibrations() -> list[str]:
        with assembly.precision.autocast(assembly.probe.input_ids.device):
            hidden = hidden_rows(assembly.student, assembly.probe, chosen.position)
        rows = assembly.teacher(assembly.probe, chosen.position)
        student = f"student {_calibrated(hidden, head_of(assembly.student), chosen.labels)}"
        if not isinstance(rows, LiveRows):
            return [student]
        return [f"teacher {_calibrated(rows.hidden, rows.head, chosen.labels)}", student]

    return "; ".join(inside(assembly.student, calibrations))


def _calibrated(hidden: Tensor, head: Head, labels: Tensor) -> str:
    n = labels.shape[0]
    sure, right = torch.empty(n), torch.empty(n)
    for i in range(0, n, 64):
        best = head.logits(hidden[i : i + 64]).softmax(-1).max(-1)
        sure[i : i + 64] = best.values.cpu()
        right[i : i + 64] = (best.indices == labels[i : i + 64]).float().cpu()
    of = torch.clamp((sure * BINS).long(), max=BINS - 1)
    gap = sum(float((sure[of == b] - right[of == b]).sum().abs()) for b in range(BINS)) / n
    perplexity = float(torch.tensor(negative_log_likelihood(hidden, head, labels) / n).exp())
    return f"perplexity {perplexity:.3g}, sure {float(sure.mean()):.3f}, right {float(right.mean()):.3f}, ECE {gap:.3f}"
