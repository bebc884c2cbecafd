"""One number, many ways to it: plain loop and Trainer, accumulation, packing and ranks agree on loss and gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainingArguments, get_scheduler

from faults.on_two_ranks import run_on_two_ranks
from selectkd.data.collate import collate_packed, pack
from selectkd.loss.plan import StreamSpec
from selectkd.objective.objective import Objective
from selectkd.objective.schedules import BetaSchedule
from selectkd.teachers import LiveTeacher
from selectkd.training.counts import REDUCTIONS
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.loop import train_loop
from selectkd.training.record.metrics import CLOCK
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import LedgerTrainer
from training.tiny import padded, texts
from training.two_ranks import KINDS

SPEC_K = {"name": "spec_k", "k": 2}
GREEDY = {"name": "greedy_topk", "k": 9}


def step_of(
    student: Any, teacher: Any, micro: list[Any], *, reduction: str, verifier: Any = SPEC_K
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one optimizer step."""
    model = DistillationModel(student, LiveTeacher(teacher)).train()
    ledger = Ledger(Objective("forward_kl", verifier, beta=0.1), reduction, streams=("a", "b"))
    for micro_batch in ledger.begin(micro):
        loss, sums = model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.now)
        loss.backward()
        ledger.add(micro_batch, loss, sums)
    total = float(ledger.reduce(student.parameters()))
    return total, {name: p.grad for name, p in student.named_parameters() if p.grad is not None}


def same(a: tuple[float, dict[str, torch.Tensor]], b: tuple[float, dict[str, torch.Tensor]]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)  # fp32 sums in another order
    assert a[1].keys() == b[1].keys() and a[1]
    for name, gradient in a[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, b[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_batch_of_eight_equals_eight_micro_batches_of_one(
    reduction: str, teacher_model: Any, new_student: Callable[[], Any]
) -> None:
    examples = texts(8)
    whole = step_of(new_student(), teacher_model, padded(examples, 8), reduction=reduction)
    eighths = step_of(new_student(), teacher_model, padded(examples, 1), reduction=reduction)
    same(whole, eighths)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_packed_equals_padded(reduction: str, teacher_model: Any, new_student: Callable[[], Any]) -> None:
    examples = texts(8)
    apart = step_of(new_student(), teacher_model, padded(examples, 8), reduction=reduction)
    packed = [collate_packed(pack(examples, 48), pad_id=0)]
    assert packed[0].input_ids.shape[0] < 8
    same(apart, step_of(new_student(), teacher_model, packed, reduction=reduction))


def test_sequence_mean_is_the_mean_over_sequences_of_means(
    teacher_model: Any, new_student: Callable[[], Any]
) -> None:
    examples = texts(3)
    together = step_of(new_student(), teacher_model, padded(examples, 3), reduction="sequence_mean")[0]
    alone = [
        step_of(new_student(), teacher_model, padded([one], 1), reduction="sequence_mean")[0]
        for one in examples
    ]
    assert together == pytest.approx(sum(alone) / 3, rel=1e-5)


def by_loop(
    student: Any, teacher: Any, micro: Any, ledger: Ledger, *, lines: list[Any], accumulation: int
) -> None:
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = {"params": [p for p in student.parameters() if p.ndim == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([{"params": matrices}, vectors], lr=1e-2, weight_decay=0.1)
    lines += train_loop(
        DistillationModel(student, LiveTeacher(teacher)),
        BatchFeed(micro),
        ledger,
        optimizer,
        steps=5,
        schedule=get_scheduler("cosine", optimizer, 2, 5),
        accumulation=accumulation,
    )


def by_trainer(
    student: Any,
    teacher: Any,
    micro: Any,
    folder: Path,
    ledger: Ledger,
    *,
    lines: list[Any],
    accumulation: int,
) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=5,
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        gradient_accumulation_steps=accumulation,
        logging_steps=1,
        optim="adamw_torch",
        seed=5,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = LedgerTrainer(
        DistillationModel(student, LiveTeacher(teacher)),
        BatchFeed(micro),
        ledger,
        args,
        on_line=lines.append,
    )
    trainer.train()


LOSSES = {
    "verifier": {"objective": Objective("forward_kl", GREEDY)},
    "selector over the step": {"objective": Objective("reverse_kl", "se_kd")},
    "a loss of each stream": {
        "objective": Objective("forward_kl", SPEC_K),
        "losses": [StreamSpec(), StreamSpec(divergence="skew_kl", language_model=0.5)],
    },
}


@pytest.mark.parametrize(
    ("loss", "reduction", "accumulation"),
    [
        ("verifier", "sequence_mean", 1),
        ("selector over the step", "token_mean", 3),
        ("a loss of each stream", "weight_mean", 2),
    ],
)
def test_the_plain_loop_equals_the_trainer(
    loss: str,
    reduction: str,
    accumulation: int,
    teacher_model: Any,
    new_student: Callable[[], Any],
    tmp_path: Path,
) -> None:
    micro = padded(texts(14), 3)
    ours, theirs, start = new_student(), new_student(), new_student()
    line_a: list[Any] = []
    line_b: list[Any] = []
    feed = lambda epoch: micro[epoch % 2 :] + micro[: epoch % 2]  # noqa: E731
    settings: Any = {
        **LOSSES[loss],
        "reduction": reduction,
        "streams": ("a", "b"),
        "seed": 5,
        "total_steps": 5,
    }
    one, other = (Ledger(**settings, beta=BetaSchedule(1.0, 0.1, steps=4)) for _ in range(2))
    by_loop(ours, teacher_model, feed, one, lines=line_a, accumulation=accumulation)
    by_trainer(theirs, teacher_model, feed, tmp_path, other, lines=line_b, accumulation=accumulation)
    for (name, a), b, first in zip(
        ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)
        assert (a - first).abs().max() > 1e-3  # they did learn
    assert [line["beta"] for line in line_a] == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1])
    for a, b in zip(line_a, line_b, strict=True):
        assert a.keys() - {*CLOCK} == b.keys() - {*CLOCK}
        for key in a.keys() - {*CLOCK} - {"streams"}:
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-9), key


def test_two_ranks_have_the_gradient_of_one(
    teacher_model: Any, new_student: Callable[[], Any], tmp_path: Path
) -> None:
    """Replicated and sharded alike: four micro-batches of 2 or fewer, two of them a rank, are one batch."""
    examples = texts(7)  # unequal counts on the two ranks
    teacher_model.save_pretrained(tmp_path / "teacher")
    new_student().save_pretrained(tmp_path / "student")
    script = Path(__file__).with_name("two_ranks.py")
    run_on_two_ranks(script, str(tmp_path), *REDUCTIONS)
    for reduction in REDUCTIONS:
        one = step_of(new_student(), teacher_model, padded(examples, 2), reduction=reduction)
        for rank, kind in itertools.product((0, 1), KINDS):
            two = load_file(tmp_path / f"{reduction}-{kind}-{rank}.safetensors")
            same(one, (float(two.pop("loss")), two))
