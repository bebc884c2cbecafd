"""distil(Trainer) under settings that other people's loops meet: resumed, cut short, without labels, by a server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from adapters.hf_programs import arguments, collated, columns, started
from adapters.test_hf import GATES, plain_step, same, trained_step
from selectkd import BetaSchedule, Objective
from selectkd.adapters.hf import STATE, distil
from selectkd.data.example import Example
from selectkd.errors import ConfigError, IntegrityError
from teachers.served import Served, on_a_port
from training.tiny import VOCABULARY, padded, texts, tiny_llama, tiny_tokenizer, write_pair

LINE = ("loss", "beta", "kl", "tokens", "acceptance")


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def unlabelled(examples: list[Any]) -> list[Any]:
    return [
        Example(one.input_ids, [False] * len(one), stream=one.stream, origin=one.origin) for one in examples
    ]


def test_a_resumed_run_draws_and_weighs_as_one_without_a_stop(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "size": 2, "accumulation": 2, "objective": GATES["sampled"], "max_steps": 4, "save_strategy": "steps",
        "save_steps": 2, "learning_rate": 1e-2, "beta": BetaSchedule(start=0.5, end=0.1, steps=4),
    }  # fmt: skip
    runs = [started(tmp_path, tiny_llama(2), tiny_llama(1), texts(24), **settings) for _ in range(2)]
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    lines = [
        [[line[key] for key in LINE] for line in run.state.log_history if "learning_rate" in line]
        for run in runs
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4
    for name, weight in weights(runs[0]).items():
        assert weight.equal(weights(runs[1])[name]), name
    (tmp_path / "checkpoint-2" / STATE).write_text("{}")
    again = started(tmp_path, tiny_llama(2), tiny_llama(1), texts(24), **settings)
    with pytest.raises(IntegrityError, match=r"selectkd\.json is damaged"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_last_step_of_fewer_texts_counts_its_own_tokens(tmp_path: Path) -> None:
    found = []
    for size in (4, 1):
        trainer = started(
            tmp_path, tiny_llama(2).double(), tiny_llama(1).double(), texts(7), size=size, accumulation=4 // size,
            objective=GATES["sampled"], max_steps=-1, num_train_epochs=1, optim="sgd", learning_rate=0.1,
        )  # fmt: skip
        trainer.train()
        assert trainer.state.global_step == trainer.ledger.step == 2
        found.append(weights(trainer))
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-9, atol=1e-12)


def test_texts_without_a_label_change_nothing_in_a_step_or_a_run(tmp_path: Path) -> None:
    examples = [*unlabelled(texts(2)), *texts(4, seed=1)]
    gradients = [
        trained_step(
            started(
                tmp_path,
                tiny_llama(2).double(),
                tiny_llama(1).double(),
                examples,
                size=size,
                accumulation=6 // size,
            )
        )
        for size in (2, 6)
    ]
    same(gradients[0], gradients[1])
    student = tiny_llama(2)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    none = unlabelled(texts(4))
    trainer = started(tmp_path, student, tiny_llama(1), none, size=2, accumulation=2, evaluation=none)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == 0.0
    assert all(weight.equal(before[name]) for name, weight in weights(trainer).items())


@pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
def test_a_server_teaches_as_the_model_behind_it(kind: str, tmp_path: Path) -> None:
    """Every token of the vocabulary is asked for, so the rows are whole."""
    write_pair(tmp_path, tiny_llama(1))
    section = {"kind": kind, "tokenizer": str(tmp_path / "teacher"), "k": VOCABULARY}
    with on_a_port(Served(tiny_llama(1).eval(), kind)) as url:
        trainer = started(
            tmp_path, tiny_llama(2), {"url": url, **section}, texts(4), size=2, accumulation=2,
            processing_class=tiny_tokenizer(), objective=GATES["greedy"],
        )  # fmt: skip
        ours = trained_step(trainer)
    plain = plain_step(tiny_llama(2), tiny_llama(1), GATES["greedy"], padded(texts(4), 2), "token_mean")
    for name, gradient in plain.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)  # of log-probabilities in JSON
    assert ours.keys() == plain.keys()


def test_bf16_is_the_products_dtype_alone(tmp_path: Path) -> None:
    objective = Objective(beta=1.0)
    trainer = started(
        tmp_path,
        tiny_llama(2),
        tiny_llama(1),
        texts(4),
        size=4,
        accumulation=1,
        bf16=True,
        objective=objective,
    )
    ours = trained_step(trainer)
    plain = plain_step(tiny_llama(2), tiny_llama(1), objective, padded(texts(4), 4), "token_mean")
    for name, gradient in plain.items():
        assert ours[name].dtype == torch.float32
        assert (ours[name] - gradient).norm() < 0.1 * gradient.norm(), name  # 8 bits, two layers


def test_noise_on_embeddings_is_the_students_in_training_alone(tmp_path: Path) -> None:
    """NEFTune: the loss of a step differs, an evaluation does not, and the teacher reads its text as it is."""
    lines = []
    for alpha in (None, 5.0):
        trainer = started(
            tmp_path, tiny_llama(2), tiny_llama(1), texts(4), size=4, accumulation=1, learning_rate=0.0,
            neftune_noise_alpha=alpha, evaluation=texts(4),
        )  # fmt: skip
        trainer.train()
        lines.append((trainer.state.log_history[0]["kl"], trainer.evaluate()["eval_kl"]))
    assert lines[0][0] != lines[1][0] and lines[0][1] == lines[1][1]


def test_an_evaluation_needs_no_text_to_train_on(tmp_path: Path) -> None:
    held_out = Dataset.from_list(columns(texts(4)))
    trainer = distil(Trainer)(
        model=tiny_llama(2), args=TrainingArguments(**arguments(tmp_path)), eval_dataset=held_out,
        data_collator=collated, teacher=tiny_llama(1),
    )  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_kl"] > 0
    assert trainer.predict(held_out).metrics["test_kl"] == metrics["eval_kl"]
    assert trainer.evaluate({"a": held_out, "b": held_out})["eval_b_kl"] == metrics["eval_kl"]


def test_liger_s_kernels_leave_the_student_s_forward_pass_alone(tmp_path: Path) -> None:
    """Its fused cross-entropy is another forward pass, set as training begins."""
    args = TrainingArguments(
        **arguments(tmp_path), use_liger_kernel=True, liger_kernel_config={"rope": False}
    )
    distil(Trainer)(model=tiny_llama(2), args=args, teacher=tiny_llama(1))
    assert args.liger_kernel_config == {
        "rope": False,
        "fused_linear_cross_entropy": False,
        "cross_entropy": False,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"compute_metrics": lambda _: {}}, "compute_metrics needs the logits"),
        ({"compute_loss_func": lambda *_, **__: 0}, "compute_loss_func is another loss"),
        ({"data_collator": lambda rows: {**collated(rows), "pixel_values": torch.zeros(2)}}, "has pixel_values"),
        ({"data_collator": lambda rows: collated(rows) | {"labels": torch.zeros(2, 3).long()}}, "labels have shape"),
    ],
)  # fmt: skip
def test_what_would_go_unread_or_does_not_fit_is_refused(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"data_collator": collated} | change
    with pytest.raises(ConfigError, match=message):
        distil(Trainer)(
            model=tiny_llama(2), args=TrainingArguments(**arguments(tmp_path)), teacher=tiny_llama(1),
            train_dataset=Dataset.from_list(columns(texts(4))), **given,
        ).train()  # fmt: skip
