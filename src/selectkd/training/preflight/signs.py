"""Signs of a pair before any training: cheap measurements by which a gate may be advised or advised against.

n supervised rows, c rows of a chunk, v vocabulary, m teachers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selectkd.data.supervised import supervised
from selectkd.loss.head import Head
from selectkd.loss.teacher_rows import LiveRows, Scratch, TeacherRows
from selectkd.models.forward import evaluating, hidden_rows
from selectkd.models.head import head_of
from selectkd.models.precision import FP32, Precision
from selectkd.models.sharded import inside
from selectkd.objective.divergences import forward_kl
from selectkd.objective.pair import entropy, label_log_prob
from selectkd.objective.verifiers import greedy_topk
from selectkd.teachers.protocol import Teacher
from selectkd.teachers.several import SeveralRows

K = 5
"""k of the greedy top-k whose TAR is a sign: the paper's."""
CHUNK = 64
"""Rows whose logits are in memory at a time."""
LEAST = -87.0
"""What -inf inside a logarithm counts as, as everywhere in this package."""


@dataclass(frozen=True)
class Signs:
    """Means over the ``rows`` of a text whose teacher is finite, at temperature 1 and over the ids both models share.

    tar: of greedy_topk, k = 5, each text's mean averaged over texts, in [0, 1]. overlap: sum_v min(p, q), in [0, 1]. In
    nats: kl, KL(p || q); teacher_entropy and student_entropy; surprise, -log p of the text's token minus the teacher's
    entropy, which is near 0 for a calibrated teacher and large for one that is sure of wrong tokens; lead, mean log p
    minus mean log q of the text's token: by how much the teacher knows the text better. agreement: sum_v min of each
    two of several teachers where both teach, in [0, 1]; None with one teacher.
    """

    rows: int
    tar: float
    overlap: float
    kl: float
    teacher_entropy: float
    student_entropy: float
    surprise: float
    lead: float
    agreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self)


@torch.no_grad()
def signs_of(
    student: nn.Module, teacher: Teacher, batch: Any, *, precision: Precision = FP32
) -> Signs | None:
    """The signs of a pair on a batch; None where the teacher's rows are no whole distributions, or no row is trained.

    A collective call where the student is sharded.
    """
    seen = supervised(batch)
    if not len(seen):
        return None

    def measured() -> Signs | None:
        with precision.autocast(batch.input_ids.device):
            hidden = hidden_rows(student, batch, seen.position)  # [n, d]
        rows = teacher(batch, seen.position)
        if not isinstance(rows, LiveRows | SeveralRows):
            return None
        return signs_of_rows(hidden, head_of(student), rows, seen.labels, seen.sequence)

    with evaluating(student):
        return inside(student, measured)


@torch.no_grad()
def signs_of_rows(
    hidden: Float[Tensor, "n d"],
    head: Head,
    rows: LiveRows | SeveralRows,
    labels: Int[Tensor, " n"],
    sequence: Int[Tensor, " n"],
) -> Signs:
    """The signs from the student's hidden states and head, the teacher's rows, the text's tokens and whose they are.

    Only [c, v] of each model exists at a time.
    """
    width, scratch, n = rows.shared_width(head.width), Scratch(), hidden.shape[0]
    verifier = greedy_topk(k=min(K, width))
    columns = torch.empty(n, 7, dtype=torch.float64)
    finite = torch.ones(n, dtype=torch.bool)
    alike = torch.zeros(2, dtype=torch.float64)
    for start in range(0, n, CHUNK):
        cut = slice(start, min(start + CHUNK, n))
        whole = slice(0, cut.stop - start)
        logits = head.logits(hidden[cut], width)  # [c, v]
        pair = rows.open(cut, width, scratch).pair(whole, logits, 1.0)
        pair = replace(pair, label=labels[cut])
        of_teacher = entropy(pair.logp)
        text = [label_log_prob(pair, logs, "a sign").clamp(min=LEAST) for logs in (pair.logp, pair.logq)]
        seen = [
            verifier(pair, logits.new_empty(whole.stop, 0)),
            pair.overlap,
            forward_kl(pair.logp, pair.logq),
            of_teacher,
            entropy(pair.logq),
            -text[0] - of_teacher,
            text[0] - text[1],
        ]
        columns[cut] = torch.stack([each.double() for each in seen], -1).cpu()
        finite[cut] = pair.finite.cpu() if pair.finite is not None else True
        if isinstance(rows, SeveralRows):
            alike += _alike(rows, cut, logits, scratch).cpu()
    columns, whose = columns[finite], sequence.cpu()[finite]
    tar = torch.stack(
        [columns[whose == one, 0].mean() for one in whose.unique()] or [columns.new_tensor(torch.nan)]
    )
    agreement = float(alike[0] / alike[1]) if alike[1] else None
    return Signs(len(columns), float(tar.mean()), *columns[:, 1:].mean(0).tolist(), agreement=agreement)


def _alike(rows: SeveralRows, cut: slice, logits: Tensor, scratch: Scratch) -> Tensor:
    """[sum of the overlap of each two teachers over the rows that both teach, how many those are]."""
    taught = [share[cut] > 0 for share in rows.share]
    logs = [_log_probs(one, cut, logits, scratch) for one in rows.rows]
    found = torch.zeros(2, dtype=torch.float64, device=logits.device)
    for a, b in combinations(range(len(logs)), 2):
        both = taught[a] & taught[b]
        found[0] += torch.minimum(logs[a], logs[b])[both].exp().sum(dtype=torch.float64)
        found[1] += both.sum()
    return found


def _log_probs(rows: TeacherRows, cut: slice, logits: Tensor, scratch: Scratch) -> Tensor:
    """One teacher's log-probabilities of a chunk, [c, v]."""
    chunk = rows.open(cut, logits.shape[1], scratch)
    return chunk.pair(slice(0, logits.shape[0]), logits, 1.0).logp
