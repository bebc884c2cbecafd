"""What a step does at its edges: not finite, nothing to train on, beta, sums, denominators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from selectkd.errors import ConfigError, DataError, NumericsError
from selectkd.loss.options import LossOptions
from selectkd.objective.objective import Objective
from selectkd.objective.schedules import BetaSchedule
from selectkd.teachers import LiveTeacher
from selectkd.training.counts import REDUCTIONS, Counts, correction, row_scale
from selectkd.training.feed import BatchFeed
from selectkd.training.heldout.evaluation import evaluate, evaluate_each, probe
from selectkd.training.ledger import Ledger
from selectkd.training.loop import train_loop
from selectkd.training.record.metrics import REQUIRED
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts, tiny_llama

GREEDY = {"name": "greedy_topk", "k": 9}


class Failing(LiveTeacher):
    """A teacher whose student breaks in chosen steps: its final norm gives nan in that forward."""

    def __init__(self, model: Any, student: Any, steps: set[int]) -> None:
        super().__init__(model)
        self.calls, self.steps = 0, steps
        student.model.norm.register_forward_hook(self._poison)

    def _poison(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return output * float("nan") if self.calls in self.steps else output


def loop(
    student: Any, teacher: Any, *, steps: int, objective: Any = None, **settings: Any
) -> Iterator[dict[str, Any]]:
    """The lines of so many steps of a student."""
    ledger = Ledger(objective or Objective("forward_kl", GREEDY), streams=("a", "b"), **settings)
    feed = BatchFeed(lambda epoch: padded(texts(6), 3))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)
    return train_loop(DistillationModel(student, teacher), feed, ledger, optimizer, steps=steps)


def test_a_step_that_is_not_finite_leaves_every_parameter_as_it_was(
    student: Any, teacher_model: Any, tmp_path: Path
) -> None:
    lines: list[Any] = []
    before: dict[int, dict[str, torch.Tensor]] = {}
    teacher = Failing(teacher_model, student, {2})
    for line in loop(student, teacher, steps=3, bad_batches=tmp_path / "bad"):
        lines.append(line)
        before[line["step"]] = {n: p.detach().clone() for n, p in student.named_parameters()}
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert lines[1]["loss"] is None
    assert all(torch.equal(before[1][n], before[2][n]) for n in before[1])
    assert any(not torch.equal(before[2][n], before[3][n]) for n in before[1])
    assert all(torch.isfinite(p).all() for p in student.parameters())
    assert [path.name for path in (tmp_path / "bad").iterdir()] == ["step-000002-rank-0.json"]


def test_four_steps_in_a_row_without_finite_numbers_end_the_run(student: Any, teacher_model: Any) -> None:
    with pytest.raises(NumericsError, match="4 steps in a row") as caught:
        list(loop(student, Failing(teacher_model, student, {2, 3, 4, 5}), steps=9))
    assert caught.value.exit_code == 6
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_a_teacher_that_is_broken_ends_the_run_before_the_student_moves(student: Any) -> None:
    broken = tiny_llama(3)
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match="rows of the teacher"):
        list(loop(student, LiveTeacher(broken), steps=2))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_batch_without_a_supervised_token_costs_nothing(
    reduction: str, student: Any, teacher_model: Any
) -> None:
    micro = padded(texts(2), 2)
    micro[0].completion.fill_(False)
    model = DistillationModel(student, LiveTeacher(teacher_model))
    ledger = Ledger(Objective("forward_kl", GREEDY), reduction, streams=("a", "b"))
    (micro_batch,) = ledger.begin(micro)
    loss, sums = model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.now)
    loss.backward()
    ledger.add(micro_batch, loss, sums)
    assert ledger.reduce(student.parameters()) == 0.0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in student.parameters())
    assert ledger.close_step(0.0)
    assert ledger.line()["tar"] is None


def test_a_feed_without_batches_is_a_data_error() -> None:
    with pytest.raises(DataError):
        next(BatchFeed(lambda epoch: []).steps(1))


def test_beta_comes_down_with_the_tar_that_was_seen(student: Any, teacher_model: Any) -> None:
    beta = BetaSchedule(1.0, 0.0, until_tar=0.9)
    lines = list(loop(student, LiveTeacher(teacher_model), steps=4, beta=beta))
    best = 0.0
    for line in lines:
        assert line["beta"] == pytest.approx(1.0 - min(best / 0.9, 1.0))
        best = max(best, line["tar"])
    assert lines[-1]["beta"] < 1.0


def test_a_line_holds_the_keys_that_are_promised(student: Any, teacher_model: Any) -> None:
    lines = list(loop(student, LiveTeacher(teacher_model), steps=2))
    assert set(REQUIRED) <= set(lines[0])
    assert set(lines[0]["streams"]) == {"a", "b"}
    assert 0.0 <= lines[0]["bite"] <= 1.0 and 0.0 <= lines[0]["tar"] <= 1.0


def test_a_stream_logs_its_own_divergence_and_beside_it_the_true_kl(student: Any, teacher_model: Any) -> None:
    model = DistillationModel(student, LiveTeacher(teacher_model), options=LossOptions(also_kl=True))
    ledger = Ledger(Objective("reverse_kl", GREEDY), streams=("a", "b"))
    (micro_batch,) = ledger.begin(padded(texts(4), 4))
    loss, sums = model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, micro_batch.plan)
    ledger.add(micro_batch, loss, sums)
    ledger.reduce([])
    assert ledger.close_step(0.0)
    told = ledger.line()["streams"]
    plain = DistillationModel(student, LiveTeacher(teacher_model))
    _, of_kl = plain(
        micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, Objective("forward_kl", GREEDY)
    )
    for number, name in enumerate(("a", "b")):
        rows = micro_batch.rows.stream == number
        assert told[name]["kl"] == pytest.approx(float(of_kl["row_divergence"][rows].mean()), rel=1e-5)
        assert told[name]["divergence"] == pytest.approx(float(sums["row_divergence"][rows].mean()), rel=1e-5)
        assert told[name]["kl"] != pytest.approx(told[name]["divergence"], rel=1e-3)


GATED = Objective("forward_kl", GREEDY, beta=0.3)


def test_evaluation_measures_every_row_where_training_thins_them_out(
    student: Any, teacher_model: Any
) -> None:
    held, teacher = padded(texts(4), 4), LiveTeacher(teacher_model)
    thin, whole = (
        evaluate(student, teacher, held, replace(GATED, thin_rejected=one), streams=("a", "b"))
        for one in (True, False)
    )
    assert thin == whole and 0 < whole.bite < 1


def test_learning_lowers_the_held_out_kl_of_its_own_text(student: Any, teacher_model: Any) -> None:
    teacher, text = LiveTeacher(teacher_model), padded(texts(6), 3)
    objective = Objective("reverse_kl", "always", beta=1.0)
    before = evaluate(student, teacher, text, objective, streams=("a", "b"))
    list(loop(student, teacher, steps=12, objective=objective))
    after = evaluate(student, teacher, text, objective, streams=("a", "b"))
    assert after.kl < before.kl
    assert before.tar == 1.0 and before.tokens == after.tokens and set(after.streams) == {"a", "b"}


def test_a_sequence_is_measured_in_a_batch_as_it_is_alone(student: Any, teacher_model: Any) -> None:
    held, teacher = texts(7), LiveTeacher(teacher_model)
    untrained = replace(held[2], completion=[False] * len(held[2]))
    each = evaluate_each(
        student, teacher, padded([*held[:2], untrained, *held[3:]], 3), GATED, streams=("a", "b")
    )
    alone = [
        evaluate(student, teacher, padded([one], 1), GATED, streams=("a", "b"))
        for one in (*held[:2], *held[3:])
    ]
    assert len(each) == 6 and any(0 < one.tar < 1 for one in each) and any(one.bite > 0 for one in each)
    for one, other in zip(each, alone, strict=True):
        assert one.tokens == other.tokens and one.streams.keys() == other.streams.keys()
        for name in (
            "kl",
            "perplexity",
            "teacher_perplexity",
            "tar",
            "acceptance",
            "bite",
            "overlap",
            "unverified",
        ):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-5, abs=1e-7), name
        (mine,), (its,) = one.streams.values(), other.streams.values()
        assert mine == pytest.approx(its, rel=1e-5)


def test_held_out_measures_equal_the_plain_program(student: Any, teacher_model: Any) -> None:
    (batch,) = padded(texts(4), 4)
    seen = evaluate(
        student, LiveTeacher(teacher_model), [batch], Objective("forward_kl", GREEDY), streams=("a", "b")
    )
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    chosen = batch.completion[:, 1:]
    with torch.no_grad():
        logq = student(**inputs).logits[:, :-1][chosen].log_softmax(-1)
        logp = teacher_model(**inputs).logits[:, :-1][chosen].log_softmax(-1)
    labels = batch.input_ids[:, 1:][chosen]
    assert seen.kl == pytest.approx(float((logp.exp() * (logp - logq)).sum(-1).mean()), rel=1e-5)
    assert seen.perplexity == pytest.approx(float((-logq.gather(1, labels[:, None])).mean().exp()), rel=1e-5)
    assert seen.teacher_perplexity == pytest.approx(
        float((-logp.gather(1, labels[:, None])).mean().exp()), rel=1e-5
    )


def test_the_probe_gives_the_same_verdicts_every_time(student: Any, teacher_model: Any) -> None:
    (batch,) = padded(texts(4), 4)
    objective = Objective("forward_kl", {"name": "spec_k", "k": 2})
    teacher = LiveTeacher(teacher_model)
    assert torch.equal(probe(student, teacher, batch, objective), probe(student, teacher, batch, objective))


def test_the_teacher_is_neither_trained_nor_saved_nor_counted(
    new_student: Callable[[], Any], teacher_model: Any
) -> None:
    model = DistillationModel(new_student(), LiveTeacher(teacher_model))
    assert all(name.startswith("student.") for name, _ in model.named_parameters())
    assert all(name.startswith("student.") for name in model.state_dict())
    model.train()
    assert not teacher_model.training and not any(p.requires_grad for p in teacher_model.parameters())


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequence_mean"):
        Ledger(Objective(), "sum")


def test_weight_mean_of_nothing_accepted_leaves_what_stands_beside_it_alone() -> None:
    assert (
        correction(Counts(2, 10), torch.tensor(0.0)) == 1.0
    )  # of a gradient of 0, but for the text's own loss
    assert correction(Counts(2, 10), torch.tensor(5.0)) == 2.0


def test_finishing_a_gradient_waits_for_no_device() -> None:
    """On the meta device every read of a number raises: sums and norm are read once, by ``close_step``."""
    parameter = torch.nn.Parameter(torch.ones(3, device="meta"))
    parameter.grad = torch.ones(3, device="meta")
    ledger = Ledger(Objective("forward_kl", GREEDY), "weight_mean", device="meta")
    loss = ledger.reduce([parameter])
    norm = torch.nn.utils.clip_grad_norm_([parameter], 1.0)
    assert loss.device.type == norm.device.type == "meta"
    with pytest.raises((NotImplementedError, RuntimeError)):
        ledger.close_step(norm)


def test_row_scales_of_a_step_sum_to_the_number_of_ranks() -> None:
    from selectkd.data.supervised import supervised

    seen = [supervised(batch) for batch in padded(texts(6), 2)]
    counts = Counts(6, sum(len(s) for s in seen), ranks=2)
    for reduction in REDUCTIONS:
        assert float(sum(row_scale(s, counts, reduction).sum() for s in seen)) == pytest.approx(2.0, rel=1e-6)
