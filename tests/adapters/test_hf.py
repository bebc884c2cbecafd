"""distil(TrainerClass): other people's Trainers, their text and their settings, with the loss and gradient of ours."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from adapters.hf_programs import arguments, columns, started
from faults.on_two_ranks import run_on_two_ranks
from faults.tiny_cache import build
from selectkd import LossOptions, Objective
from selectkd.adapters.hf import batch_of, distil
from selectkd.data.collate import collate, collate_packed
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, SelectKDError
from selectkd.teachers import LiveTeacher
from selectkd.teachers.cache.build import CacheOptions
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from training.tiny import padded, texts, tiny_llama, tiny_tokenizer, write_pair

GATES = {
    "greedy": Objective("forward_kl", {"name": "greedy_topk", "k": 9}, 0.1),
    "sampled": Objective("generalized_jsd", {"name": "spec_k", "k": 2}, 0.1),
    "ranked": Objective("reverse_kl", {"name": "se_kd", "share": 0.5}, 0.1),
}


def plain_step(
    student: Any, teacher: Any, objective: Objective, micro: list[Any], reduction: str, *, rows: Any = None
) -> dict[str, Any]:
    """Gradients of one optimizer step by the ledger and the model of our own engines."""
    model = DistillationModel(student, rows or LiveTeacher(teacher)).train()
    ledger = Ledger(objective, reduction, seed=42, streams=("a", "b"))

    def ask(micro_batch: Any, first: Any) -> Any:
        with torch.no_grad():
            return model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, first)

    for micro_batch in ledger.begin(micro, ask):
        loss, sums = model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, micro_batch.plan)
        loss.backward()
        ledger.add(micro_batch, loss, sums)
    ledger.reduce(student.parameters())
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def trained_step(trainer: Any) -> dict[str, Any]:
    """Gradients of the first optimizer step of a Trainer, before it clips or steps."""
    found: dict[str, Any] = {}
    plain = trainer._clip_grad_norm

    def kept(model: Any) -> Any:
        found.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return plain(model)

    trainer._clip_grad_norm = kept
    trainer.train()
    return found


def same(ours: dict[str, Any], plain: dict[str, Any]) -> None:
    assert ours.keys() == plain.keys() and ours
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "weight_mean"])
def test_a_trainer_s_gradient_is_ours_in_fp64(gate: str, reduction: str, tmp_path: Path) -> None:
    """Three micro-batches of uneven lengths, the last one smaller."""
    examples = texts(8)
    teacher = tiny_llama(1, layers=3).double()
    trainer = started(
        tmp_path, tiny_llama(2).double(), teacher, examples, size=3, accumulation=3, objective=GATES[gate],
        reduction=reduction,
    )  # fmt: skip
    ours = trained_step(trainer)
    same(ours, plain_step(tiny_llama(2).double(), teacher, GATES[gate], padded(examples, 3), reduction))


def test_eight_micro_batches_of_one_are_one_of_eight(tmp_path: Path) -> None:
    found = [
        trained_step(
            started(
                tmp_path, tiny_llama(2).double(), tiny_llama(1).double(), texts(8), size=size,
                accumulation=8 // size, objective=GATES["sampled"],
            )
        )
        for size in (8, 1)
    ]  # fmt: skip
    same(found[1], found[0])


def test_adapters_alone_train_and_have_our_gradient(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = get_peft_model(tiny_llama(2).double(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plain = copy.deepcopy(adapted)
    teacher, examples = tiny_llama(1).double(), texts(6)
    trainer = started(tmp_path, adapted, teacher, examples, size=3, accumulation=2, objective=GATES["greedy"])
    ours = trained_step(trainer)
    assert all("lora" in name for name in ours)
    same(ours, plain_step(plain, teacher, GATES["greedy"], padded(examples, 3), "token_mean"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    found = [
        trained_step(
            started(
                tmp_path, tiny_llama(2).double(), tiny_llama(1).double(), texts(6), size=6, accumulation=1,
                gradient_checkpointing=again,
            )
        )
        for again in (False, True)
    ]  # fmt: skip
    same(found[1], found[0])


def test_two_ranks_are_one(tmp_path: Path) -> None:
    """DistributedDataParallel over gloo, uneven counts of tokens on the two ranks; and, of the module, logits whose
    vocabulary lies in parts over them."""
    run_on_two_ranks(Path(__file__).with_name("hf_programs.py"), str(tmp_path))
    one = trained_step(
        started(tmp_path, tiny_llama(2).double(), tiny_llama(1).double(), texts(8), size=8, accumulation=1)
    )
    for rank in (0, 1):
        parts = load_file(tmp_path / f"vocabulary-{rank}.safetensors")
        torch.testing.assert_close(parts["parts"], parts["whole"], rtol=0, atol=1e-12)
        assert parts["whole"].abs().max() > 0
        two = load_file(tmp_path / f"rank-{rank}.safetensors")
        same({name.removeprefix("module."): value for name, value in two.items()}, one)


@pytest.mark.parametrize("size", [2, 5])
def test_an_evaluation_is_over_the_tokens_of_all_its_text(size: int, tmp_path: Path) -> None:
    student, teacher, examples = tiny_llama(2), tiny_llama(1), texts(7)
    trainer = started(
        tmp_path, student, teacher, texts(4), size=2, accumulation=1, objective=GATES["greedy"], evaluation=examples,
        per_device_eval_batch_size=size,
    )  # fmt: skip
    metrics = trainer.evaluate()
    batch = collate(examples, pad_id=0)
    seen = supervised(batch)
    with torch.no_grad():
        logp, logq = (
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)[seen.position]
            .double().log_softmax(-1)
            for m in (teacher.eval(), student.eval())
        )  # fmt: skip
    kl = (logp.exp() * (logp - logq)).sum(-1)
    accepted = ((logp > logp.gather(1, logq.argmax(1, keepdim=True))).sum(1) < 9).double()
    assert metrics["eval_kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["eval_acceptance"] == pytest.approx(accepted.mean().item(), abs=1e-6)
    weight = 0.1 + 0.9 * accepted
    assert metrics["eval_loss"] == pytest.approx((weight * kl).mean().item(), rel=1e-4)
    assert trainer.state.log_history[-1]["eval_kl"] == metrics["eval_kl"]


def test_the_lines_of_a_run_hold_our_measures_and_it_learns(tmp_path: Path) -> None:
    trainer = started(
        tmp_path, tiny_llama(2), tiny_llama(1), texts(16), size=4, accumulation=2, max_steps=8,
        evaluation=texts(8, seed=1), eval_strategy="steps", eval_steps=4, learning_rate=1e-2,
        objective=GATES["greedy"],
    )  # fmt: skip
    trainer.train()
    lines = [line for line in trainer.state.log_history if "learning_rate" in line]
    assert len(lines) == 8 and all(
        {"kl", "tar", "bite", "acceptance", "beta"} <= line.keys() for line in lines
    )
    assert lines[-1]["kl"] < lines[0]["kl"]
    held_out = [line["eval_kl"] for line in trainer.state.log_history if "eval_kl" in line]
    assert len(held_out) == 2 and held_out[1] < held_out[0]


def test_a_saved_student_is_a_plain_model(tmp_path: Path) -> None:
    trainer = started(
        tmp_path, tiny_llama(2), tiny_llama(1), texts(4), size=2, accumulation=1, save_strategy="no"
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    again = type(trainer.model).from_pretrained(tmp_path / "student")
    ids = torch.tensor([[5, 6, 7]])
    assert again(ids).logits.equal(trainer.model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["folder", "section", "rows", "cache"])
def test_a_teacher_may_be_a_folder_a_recipe_s_section_or_a_teacher_of_ours(kind: str, tmp_path: Path) -> None:
    write_pair(tmp_path, tiny_llama(1))
    folder = str(tmp_path / "teacher")
    kinds = {"folder": folder, "section": {"model": folder}, "rows": LiveTeacher(tiny_llama(1))}
    if kind == "cache":  # of the last hidden states, in fp32
        build(folder, tmp_path / "cache", options=CacheOptions(payload="hidden", precision="float32"))
    teacher = kinds.get(kind, str(tmp_path / "cache"))
    trainer = started(
        tmp_path, tiny_llama(2), teacher, texts(4), size=4, accumulation=1, processing_class=tiny_tokenizer()
    )  # fmt: skip
    plain = started(tmp_path, tiny_llama(2), tiny_llama(1), texts(4), size=4, accumulation=1)
    same(trained_step(trainer), trained_step(plain))


def test_a_step_that_is_not_finite_changes_no_weight(tmp_path: Path) -> None:
    student = tiny_llama(2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trainer = started(tmp_path, student, tiny_llama(1), texts(4), size=4, accumulation=1)
    plain = trainer.ledger.add
    trainer.ledger.add = lambda micro, loss, sums: plain(micro, loss * torch.nan, sums)
    trainer.train()
    assert trainer.ledger.left_out == [1]
    assert all(p.equal(before[name]) for name, p in student.named_parameters())


def test_batches_of_other_collators_are_read_as_ours() -> None:
    examples = texts(3)
    ours = collate(examples, pad_id=0, pad_to_multiple_of=1)
    labels = ours.input_ids.masked_fill(~ours.completion, -100)
    right = batch_of({"input_ids": ours.input_ids, "labels": labels, "attention_mask": ours.attention_mask})
    flipped = {"input_ids": ours.input_ids, "labels": labels, "attention_mask": ours.attention_mask}
    left = batch_of({name: padded_left(value, ours.attention_mask) for name, value in flipped.items()})
    packed = collate_packed([examples], pad_to_multiple_of=1)
    free = batch_of(
        {"input_ids": packed.input_ids, "position_ids": packed.position_ids,
         "labels": packed.input_ids.masked_fill(~packed.completion, -100)}
    )  # fmt: skip
    assert free.packed and not right.packed
    for batch in (right, left, free):
        assert [one.tolist() for one in batch.samples()] == [one.tolist() for one in ours.samples()]
        seen, wanted = supervised(batch), supervised(ours)
        assert seen.labels.equal(wanted.labels) and seen.sequence.equal(wanted.sequence)


def padded_left(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.stack(
        [row.roll(int(values.shape[1] - keep.sum())) for row, keep in zip(values, mask, strict=True)]
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"teacher": None}, "there is no teacher"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
        (
            {
                "objective": Objective("reverse_kl"),
                "options": LossOptions(temperature=2.0),
                "teacher": "gone",
            },
            "gone",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_a_step(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given = {"teacher": tiny_llama(1)} | change
    with pytest.raises(SelectKDError, match=message):
        started(
            tmp_path, tiny_llama(2), given.pop("teacher"), texts(2), size=2, accumulation=1,
            processing_class=tiny_tokenizer(), **given,
        )  # fmt: skip


def test_labels_that_are_not_the_text_and_classes_that_are_no_trainer_are_refused() -> None:
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ConfigError, match="a label is not the token"):
        batch_of({"input_ids": ids, "labels": ids + 1})
    with pytest.raises(ConfigError, match="no labels"):
        batch_of({"input_ids": ids})
    with pytest.raises(ConfigError, match=r"no transformers.Trainer"):
        distil(dict)  # type: ignore[arg-type]


def test_three_lines_make_a_trainer_a_distilling_one(tmp_path: Path) -> None:
    """As docs/hosts.md has them."""
    trainer_class = distil(Trainer)
    trainer = trainer_class(
        model=tiny_llama(2), args=TrainingArguments(**arguments(tmp_path)),
        train_dataset=Dataset.from_list(columns(texts(4))), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
        processing_class=tiny_tokenizer(), teacher=tiny_llama(1),
    )  # fmt: skip
    assert trainer.train().global_step == 1
