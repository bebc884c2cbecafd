"""Blocks of any size and verifiers by statistics: the same loss, and nothing that is missing is made up."""

from __future__ import annotations

import pytest
import torch

from selectkd import Head, LiveRows, Objective, distillation_loss
from selectkd.errors import ConfigError
from selectkd.loss import block_eager as dense
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.divergences.closed_form import closed_form_of
from selectkd.objective.verifiers import VERIFIERS, RowStatistics, greedy_topk

CLOSED = [name for name, divergence in DIVERGENCES.items() if closed_form_of(divergence)]


@pytest.mark.parametrize(
    ("name", "verifier"), [*((n, "greedy_topk") for n in CLOSED), *(("forward_kl", v) for v in VERIFIERS)]
)
@pytest.mark.parametrize("shift", [0.0, 200.0])  # beyond what e^z can say in fp32
@pytest.mark.parametrize("softcap", [None, 300.0])
def test_blocks_of_any_size_give_the_same(monkeypatch, name, verifier, shift, softcap):
    generator = torch.Generator().manual_seed(3)
    hidden, weight, theirs, their_weight = (
        torch.randn(*shape, generator=generator) for shape in ((19, 8), (300, 8), (19, 6), (300, 6))
    )
    theirs[5] = torch.nan
    shared = torch.rand(300, generator=generator) > 0.1
    uniform = torch.rand(19, Objective(name, verifier).uniforms_per_token, generator=generator)
    labels = torch.randint(300, (19,), generator=generator)
    bias = torch.full((300,), shift)
    bias[7] = -torch.inf
    told = []
    for rows in (16, 1):
        monkeypatch.setattr(dense, "BLOCK_ENTRIES", rows * 300)
        leaf = hidden.clone().requires_grad_()
        head = Head(weight, bias=bias, softcap=softcap)
        loss, seen = distillation_loss(
            leaf, head, LiveRows(theirs, Head(their_weight), shared=shared), Objective(name, verifier), uniform,
            labels=labels, also_kl=True,
        )  # fmt: skip
        loss.backward()
        told.append((loss, leaf.grad, seen))
    (loss, gradient, seen), (other, other_gradient, other_seen) = told
    torch.testing.assert_close(other, loss, rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-4, atol=1e-6)
    assert torch.isfinite(loss) and torch.isfinite(gradient).all()
    assert other_seen["teacher_nonfinite"] == 1
    assert other_seen.keys() == seen.keys()
    near = 1e-3 if verifier == "hellinger" else 1e-6  # a square root at 0
    for key in seen:
        torch.testing.assert_close(other_seen[key], seen[key], rtol=1e-4, atol=near)


@pytest.mark.parametrize("verifier", ["prefix_gate", "matched_shuffle"])
def test_a_teacher_row_that_is_not_finite_does_not_reach_the_other_rows_of_a_batch_that_is_ranked(verifier):
    hidden, weight, theirs, their_weight = (
        torch.randn(*shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(((37, 8), (53, 8), (37, 12), (53, 12)))
    )
    theirs[3] = torch.nan
    objective = Objective("forward_kl", {"name": verifier, "k": 45})  # of 53: most are accepted
    uniform = torch.rand(37, objective.uniforms_per_token)
    loss, seen = distillation_loss(
        hidden, weight, LiveRows(theirs, their_weight), objective, uniform,
        sequence=torch.arange(37) // 10,
    )  # fmt: skip
    assert torch.isfinite(loss)
    assert torch.isfinite(seen["row_acceptance"]).all()
    assert seen["row_acceptance"][10:].sum() > 0


def test_a_verifier_that_looks_at_what_it_does_not_name_is_told_so():
    statistics = RowStatistics(5, overlap=torch.ones(2))
    with pytest.raises(ConfigError, match="reads token_rank, which its ``reads`` does not name"):
        greedy_topk().from_statistics(statistics, torch.empty(2, 0))


def test_a_verifier_of_labels_without_labels_is_refused():
    hidden, weight = torch.randn(4, 8), torch.randn(20, 8)
    with pytest.raises(ConfigError, match="pass labels"):
        distillation_loss(
            hidden,
            weight,
            LiveRows(hidden, weight),
            Objective("forward_kl", "label_top_k"),
            torch.empty(4, 0),
        )


def test_the_rank_counts_ties_as_no_better():
    zp = torch.tensor([[3.0, 2.0, 2.0, 5.0, 1.0], [0.0, 1.0, 1.0, 1.0, 4.0]])
    expected = [[1, 2, 2, 0, 4], [4, 1, 1, 1, 0]]

    def block(rows):
        norm = torch.zeros(len(rows), 1)
        return dense.Block(rows, rows.clone(), norm, norm, rows, rows, rows, torch.empty_like(rows))

    for token in range(5):
        ranks = dense.token_rank(block(zp), torch.full((2,), token))
        assert ranks.flatten().tolist() == [expected[0][token], expected[1][token]]
