"""Terms beside the objective: no gate, no reduction and no dead row of a head touches them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from selectkd import Head, LiveRows, Objective
from selectkd.loss.plan import LossPlan, StreamLoss, StreamSpec
from selectkd.loss.terms import Forward, weighted_sum
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import traits_of
from selectkd.teachers import LiveTeacher
from selectkd.training.counts import REDUCTIONS
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts, tiny_llama

N, V, D = 9, 13, 4
LANGUAGE = 0.5
EXAMPLES = texts(8, seed=3)


class Never:
    """Accepts nothing."""

    def __call__(self, pair: Any, uniform: Tensor) -> Tensor:
        return torch.zeros(pair.logp.shape[0], dtype=pair.logp.dtype)


def cross_entropy_of(student: Any, reduction: str, *, stream: int | None = None) -> Tensor:
    """The gradient of the cross-entropy of the texts (of a stream) by transformers' own logits, one vector."""
    student.zero_grad(set_to_none=True)
    total = torch.zeros((), dtype=torch.float64)
    tokens = sum(sum(one.completion) for one in EXAMPLES)
    for one in EXAMPLES:
        if stream is not None and one.stream != stream:
            continue
        ids, learn = torch.tensor([one.input_ids]), torch.tensor(one.completion)[1:]
        logp = student(ids).logits[0, :-1].log_softmax(-1)
        each = -logp.gather(-1, ids[0, 1:, None])[:, 0][learn]
        total = total + (each.mean() / len(EXAMPLES) if reduction == "sequence_mean" else each.sum() / tokens)
    total.backward()
    return torch.cat([total.reshape(1), *(p.grad.flatten() for p in student.parameters())]).detach()


@pytest.mark.parametrize("size", [8, 3])
@pytest.mark.parametrize("verifier", ["greedy_topk", "spec_k", "se_kd", Never()])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_language_modelling_loss_counts_what_it_says_whatever_is_accepted(
    reduction: str, verifier: Any, size: int
) -> None:
    student, teacher, reference = (
        tiny_llama(seed, layers=1, hidden=16, dtype=torch.float64) for seed in (2, 1, 5)
    )
    loss_of = DistillationModel(student, LiveTeacher(teacher, reference=LiveTeacher(reference))).train()

    @torch.no_grad()
    def ask(micro_batch: Any, first: Any) -> Any:
        return loss_of(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, first)

    def gradient(language: float) -> Tensor:
        losses = [StreamSpec(beta=0.0, language_model=language), StreamSpec(beta=0.0)]
        ledger = Ledger(Objective("forward_kl", verifier), reduction, streams=("a", "b"), losses=losses)
        student.zero_grad(set_to_none=True)
        for micro_batch in ledger.begin(padded(EXAMPLES, size), ask):
            loss, sums = loss_of(
                micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, micro_batch.plan
            )
            loss.backward()
            ledger.add(micro_batch, loss, sums)
        total = ledger.reduce(student.parameters())
        return torch.cat([total.reshape(1), *(p.grad.flatten() for p in student.parameters())]).detach()

    added = gradient(LANGUAGE) - (0.0 if isinstance(verifier, Never) else gradient(0.0))
    wanted = LANGUAGE * cross_entropy_of(student, reduction, stream=0)
    torch.testing.assert_close(added, wanted, rtol=1e-6, atol=1e-8)  # row scales are fp32


@pytest.mark.parametrize("dead", ["beyond the teacher's", "not shared"])
def test_dead_rows_of_the_students_head_take_no_part_in_a_language_modelling_loss(dead: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, theirs, teacher = (
        torch.randn(*size, generator=generator, dtype=torch.float64)
        for size in ((N, D), (V, D), (N, D), (V, D))
    )
    plan = LossPlan((StreamLoss(Objective("forward_kl", "always", beta=1.0), language_model=1.0),))
    ones = torch.ones(N, dtype=torch.float64)

    def loss(head: Tensor, rows: LiveRows) -> Tensor:
        labels, zero = torch.arange(N), torch.zeros(N, dtype=torch.long)
        forward = Forward(hidden, Head(head), rows, labels, zero, zero, torch.empty(N, 0))
        return weighted_sum(plan.terms(forward), forward, ones)[0]

    wide = torch.cat([weight, 3 * torch.randn(5, D, generator=generator, dtype=torch.float64)])
    if dead == "not shared":
        shared = torch.arange(V + 5) < V
        rows = LiveRows(theirs, torch.cat([teacher, teacher[:5]]), shared=shared)
    else:
        rows = LiveRows(theirs, teacher)
    torch.testing.assert_close(
        loss(wide, rows), loss(weight, LiveRows(theirs, teacher)), rtol=1e-12, atol=0.0
    )


@pytest.mark.parametrize("name", [name for name in SELECTORS if traits_of(SELECTORS[name]()).needs_reference])
def test_a_reference_student_with_a_narrower_head_is_compared_on_the_ids_it_has(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, theirs, teacher, own = (
        torch.randn(*size, generator=generator) for size in ((N, D), (V, D), (N, D), (V, D), (N, D))
    )
    labels, zero = torch.arange(N), torch.zeros(N, dtype=torch.long)

    def kept(width: int) -> Tensor:
        rows = LiveRows(theirs, teacher[:width], reference=LiveRows(own, teacher[: V - 3]))
        forward = Forward(hidden, Head(weight[:width]), rows, labels, zero, zero, torch.empty(N, 0))
        plan = LossPlan.of(Objective("forward_kl", name, beta=0.0))
        return weighted_sum(plan.terms(forward), forward, torch.ones(N))[1]["row_acceptance"]

    assert 0 < kept(V).sum() < N
    assert torch.equal(kept(V), kept(V - 3))
