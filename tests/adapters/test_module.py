"""SelecTKDLoss in other people's loops: its gradient is distillation_loss's, whatever form the outputs come in."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from selectkd import CachedRows, Head, LiveRows, Objective, distillation_loss, uniforms
from selectkd.errors import ConfigError
from selectkd.nn import SelecTKDLoss

B, T, V, D, E = 3, 7, 24, 8, 6
GATES = [("forward_kl", {"name": "greedy_topk", "k": 3}), ("generalized_jsd", {"name": "spec_k", "k": 2}),
         ("reverse_kl", "always"), ("total_variation", {"name": "greedy_topk", "k": 2}),
         ("forward_kl", {"name": "se_kd", "share": 0.5})]  # fmt: skip


class Texts:
    """Both models' hidden states and heads of b texts, and their labels, in fp64."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        draw = torch.Generator().manual_seed(seed)
        new = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)  # noqa: E731
        self.hidden, self.head = new(B, T, D).requires_grad_(), (2 * new(V, D)).requires_grad_()
        self.teacher_hidden, self.teacher_head = new(B, T, E), 2 * new(V, E)
        self.labels = torch.randint(0, V, (B, T), generator=draw)
        self.labels[0, :3] = self.labels[1, 4:] = self.labels[2, ::2] = -100

    def student(self, form: str) -> Any:
        if form == "hidden":
            return self.hidden, self.head
        logits = self.hidden @ self.head.T
        return logits if form == "logits" else type("Output", (), {"logits": logits})()

    def teacher(self, form: str) -> Any:
        if form == "rows":
            return LiveRows(self.teacher_hidden.flatten(0, 1), self.teacher_head)
        return (
            (self.teacher_hidden, self.teacher_head)
            if form == "hidden"
            else self.teacher_hidden @ self.teacher_head.T
        )

    def gradients(self, loss: torch.Tensor) -> tuple[float, torch.Tensor, torch.Tensor]:
        self.hidden.grad = self.head.grad = None
        loss.backward()
        return loss.item(), self.hidden.grad, self.head.grad


def plainly(
    texts: Texts, gate: Any, *, weight: Any = None, count: int | None = None, temperature: float = 1.0
) -> torch.Tensor:
    """distillation_loss on the rows that count, taken out by hand."""
    here = (texts.labels != -100).flatten().nonzero()[:, 0]
    objective = Objective(*gate, 0.1)
    n = len(here)
    scale = torch.ones(n, dtype=torch.float64) if weight is None else weight.flatten()[here]
    return distillation_loss(
        texts.hidden.flatten(0, 1)[here], texts.head,
        LiveRows(texts.teacher_hidden.flatten(0, 1)[here], texts.teacher_head), objective,
        uniforms(n, objective.uniforms_per_token, seed=42, step=0, counter=here), row_scale=scale / (count or n),
        labels=texts.labels.flatten()[here], sequence=here // T, temperature=temperature,
    )[0]  # fmt: skip


def same(one: Any, other: Any) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-12)
    for a, b in zip(one[1:], other[1:], strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("student", ["hidden", "logits", "output"])
@pytest.mark.parametrize("teacher", ["hidden", "logits", "rows"])
@pytest.mark.parametrize("gate", GATES, ids=str)
def test_every_form_of_the_outputs_has_the_gradient_of_distillation_loss(gate, teacher, student):
    texts = Texts()
    loss = SelecTKDLoss(*gate, 0.1)
    ours = texts.gradients(loss(texts.student(student), texts.teacher(teacher), texts.labels))
    same(ours, texts.gradients(plainly(texts, gate)))
    assert int(loss.sums["n"]) == int((texts.labels != -100).sum())


@pytest.mark.parametrize("student", ["hidden", "logits"])
def test_weights_of_tokens_and_a_temperature_join_the_product(student):
    texts, weight = Texts(), torch.rand(B, T, dtype=torch.float64)
    loss = SelecTKDLoss(*GATES[0], 0.1, temperature=2.0)
    ours = texts.gradients(loss(texts.student(student), texts.teacher("logits"), texts.labels, weight=weight))
    same(ours, texts.gradients(plainly(texts, GATES[0], weight=weight, temperature=2.0)))


@pytest.mark.parametrize("student", ["hidden", "logits"])
def test_one_batch_of_three_equals_three_of_one_by_the_count_of_the_step(student):
    texts, count = Texts(), 9
    loss = SelecTKDLoss(*GATES[0], 0.1)
    whole = texts.gradients(loss(texts.student(student), texts.teacher("hidden"), texts.labels, count))
    parts, total = [], 0.0
    for i in range(B):
        one = copy.copy(texts)
        one.hidden, one.head = (
            texts.hidden[i : i + 1].detach().requires_grad_(),
            texts.head.detach().requires_grad_(),
        )
        one.teacher_hidden = texts.teacher_hidden[i : i + 1]
        value, *found = one.gradients(
            loss(one.student(student), one.teacher("hidden"), texts.labels[i : i + 1], count)
        )
        parts.append(found)
        total += value
    same((total, torch.cat([a for a, _ in parts]), sum(b for _, b in parts)), whole)


@pytest.mark.parametrize("student", ["hidden", "logits"])
def test_labels_of_the_inputs_are_shifted_where_asked(student):
    texts = Texts()
    given = torch.cat([torch.full((B, 1), 5), texts.labels[:, :-1]], 1)
    kept = texts.labels.clone()
    kept[:, -1] = -100
    ours = SelecTKDLoss(*GATES[0], 0.1, shift=True)(texts.student(student), texts.teacher("logits"), given)
    texts.labels = kept
    same(texts.gradients(ours), texts.gradients(plainly(texts, GATES[0])))


def test_a_mask_stands_for_labels():
    texts, loss = Texts(), SelecTKDLoss(*GATES[0], 0.1)
    by_mask = loss(texts.student("logits"), texts.teacher("logits"), texts.labels != -100)
    assert by_mask.item() == loss(texts.student("logits"), texts.teacher("logits"), texts.labels).item()


@pytest.mark.parametrize("wider", ["student", "teacher"])
def test_ids_that_one_side_lacks_have_no_gradient(wider):
    texts, more = Texts(), torch.randn(B, T, 3, dtype=torch.float64)
    student, teacher = texts.student("logits"), texts.teacher("logits")
    if wider == "teacher":
        loss = SelecTKDLoss(*GATES[0], 0.1)(student, torch.cat([teacher, more], -1), texts.labels)
        same(texts.gradients(loss), texts.gradients(plainly(texts, GATES[0])))
        return
    logits = torch.cat([student.detach(), more], -1).requires_grad_()
    SelecTKDLoss(*GATES[0], 0.1)(logits, teacher, texts.labels).backward()
    assert logits.grad[..., V:].abs().max() == 0 and logits.grad[..., :V].abs().max() > 0


def test_stored_tokens_are_a_teacher_of_every_position_or_of_those_that_count():
    texts, loss = Texts(), SelecTKDLoss("forward_kl", {"name": "greedy_topk", "k": 2}, 0.1)
    best = torch.log_softmax(texts.teacher("logits"), -1).flatten(0, 1).topk(8)
    here = (texts.labels != -100).flatten()
    rows = CachedRows(best.indices, best.values), CachedRows(best.indices[here], best.values[here])
    found = [texts.gradients(loss(texts.student("logits"), one, texts.labels)) for one in rows]
    same(found[0], found[1])
    objective = Objective("forward_kl", {"name": "greedy_topk", "k": 2}, 0.1)
    scale = torch.full((int(here.sum()),), 1.0 / int(here.sum()), dtype=torch.float64)
    plain, _ = distillation_loss(
        texts.hidden.flatten(0, 1)[here], texts.head, rows[1], objective, row_scale=scale
    )
    same(found[0], texts.gradients(plain))


def test_a_batch_where_nothing_counts_is_0_and_has_a_gradient():
    texts = Texts()
    loss = SelecTKDLoss()(texts.student("logits"), texts.teacher("logits"), torch.full((B, T), -100))
    assert loss.item() == 0.0
    loss.backward()
    assert texts.hidden.grad.abs().max() == 0


def test_no_tensor_of_logits_is_rounded_under_autocast():
    texts = Texts(dtype=torch.float32)
    student, teacher = texts.student("logits"), texts.teacher("logits")
    loss = SelecTKDLoss(*GATES[0], 0.1)
    plain = loss(student, teacher, texts.labels)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(student, teacher, texts.labels).item() == plain.item()


def test_sampled_verdicts_change_from_step_to_step_in_training_alone():
    texts, loss = Texts(), SelecTKDLoss("forward_kl", {"name": "spec_k", "k": 1}, 0.0)
    values = [loss(texts.student("logits"), texts.teacher("logits"), texts.labels).item() for _ in range(4)]
    assert len(set(values)) > 1 and loss.step == 4
    loss.eval()
    assert (
        len({loss(texts.student("logits"), texts.teacher("logits"), texts.labels).item() for _ in range(3)})
        == 1
    )


def test_a_linear_head_and_one_with_a_soft_cap_are_heads():
    texts = Texts()
    layer = nn.Linear(D, V).double()
    loss = SelecTKDLoss(*GATES[0], 0.1)
    by_layer = loss((texts.hidden, layer), texts.teacher("logits"), texts.labels)
    by_head = loss((texts.hidden, Head(layer.weight, layer.bias)), texts.teacher("logits"), texts.labels)
    by_logits = loss(layer(texts.hidden), texts.teacher("logits"), texts.labels)
    assert by_layer.item() == by_head.item() == pytest.approx(by_logits.item(), rel=1e-12)
    capped = loss((texts.hidden, Head(layer.weight, softcap=2.0)), texts.teacher("logits"), texts.labels)
    plain = loss(2 * torch.tanh(texts.hidden @ layer.weight.T / 2), texts.teacher("logits"), texts.labels)
    assert capped.item() == pytest.approx(plain.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(B, T + 1, dtype=torch.long)}, "labels has shape"),
        ({"teacher": torch.zeros(B, T - 1, V)}, "of the same positions"),
        ({"student": "text"}, "the student's output is a str"),
        ({"student": torch.zeros(B, T, V, dtype=torch.float16)}, "float16"),
        ({"weight": torch.ones(B)}, "weight has shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_name(change, message):
    given = {
        "student": torch.zeros(B, T, V),
        "teacher": torch.zeros(B, T, V),
        "labels": torch.zeros(B, T).long(),
    }
    given |= change
    weight = given.pop("weight", None)
    with pytest.raises(ConfigError, match=message):
        SelecTKDLoss()(given["student"], given["teacher"], given["labels"], weight=weight)
