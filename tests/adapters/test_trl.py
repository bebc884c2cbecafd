"""TRL's trainers with the verified loss, by TRL itself where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from adapters.hf_programs import collated, columns
from adapters.test_hf import GATES, plain_step, same, trained_step
from selectkd import Objective
from selectkd.adapters import trl as adapters
from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.data.supervised import supervised
from training.tiny import padded, texts, tiny_llama, tiny_tokenizer

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # the host's own

SETTINGS = {
    "max_steps": 1, "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": True, "report_to": "none", "bf16": False,
    "save_strategy": "no", "disable_tqdm": True, "remove_unused_columns": False, "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 2, "gradient_checkpointing": False, "seed": 42,
}  # fmt: skip
CHAT = "{% for m in messages %}{{ m['content'] }}</s> {% endfor %}"


def in_order(trainer: Any) -> Any:
    trainer._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(trainer.train_dataset)
    return trainer


def test_the_sft_trainer_has_our_gradient_in_fp64(tmp_path: Path) -> None:
    teacher, examples = tiny_llama(1, layers=3).double(), texts(6)
    args = trl.SFTConfig(str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, **SETTINGS)
    trainer = in_order(
        adapters.SFTTrainer(
            model=tiny_llama(2).double(), args=args, train_dataset=Dataset.from_list(columns(examples)),
            data_collator=collated, processing_class=tiny_tokenizer(), teacher=teacher, objective=GATES["greedy"],
        )
    )  # fmt: skip
    ours = trained_step(trainer)
    same(
        ours, plain_step(tiny_llama(2).double(), teacher, GATES["greedy"], padded(examples, 3), "token_mean")
    )
    line = trainer.state.log_history[0]
    assert {"kl", "tar", "bite"} <= line.keys() and "entropy" not in line


def test_the_sft_trainer_s_own_text_and_evaluation_are_read(tmp_path: Path) -> None:
    """Prompts and completions by TRL's own tokenizing and collator; only the completion counts."""
    rows = Dataset.from_list([{"prompt": f"w1 w2 w{i}", "completion": f" w{i} w5 w7"} for i in range(6)])
    args = trl.SFTConfig(str(tmp_path), max_length=16, eval_strategy="steps", eval_steps=1, **SETTINGS)
    trainer = adapters.SFTTrainer(
        model=tiny_llama(2), args=args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer(),
        teacher=tiny_llama(1),
    )  # fmt: skip
    trainer.train()
    history = trainer.state.log_history
    assert next(line["tokens"] for line in history if "tokens" in line) == 6 * 4  # three words and the end
    assert all(line["eval_kl"] > 0 for line in history if "eval_loss" in line)


def test_texts_that_trl_packs_into_one_row_are_read_as_each_is_alone(tmp_path: Path) -> None:
    rows = Dataset.from_list(
        [{"prompt": f"w1 w2 w{i}", "completion": f" w{i} w5" + " w9" * i} for i in range(6)]
    )
    found, tokens = [], set()
    for packing in (False, True):
        settings = SETTINGS | {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 6}
        args = trl.SFTConfig(str(tmp_path), max_length=16, packing=packing, **settings)
        trainer = adapters.SFTTrainer(
            model=tiny_llama(2).double(), args=args, train_dataset=rows, processing_class=tiny_tokenizer(),
            teacher=tiny_llama(1).double(), objective=GATES["greedy"],
        )  # fmt: skip
        found.append(trained_step(in_order(trainer)))
        tokens.add(trainer.ledger.tokens)
    assert len(tokens) == 1
    for name, gradient in found[0].items():
        # positions and masks are other tensors, and attention sums in fp32
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_a_turn_that_is_the_assistant_s_alone_counts(tmp_path: Path) -> None:
    """assistant_only_loss, by the template's generation marks."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
        "{% endgeneration %}{% else %}{{ m['content'] }} {% endif %}{% endfor %}"
    )
    turns = [("user", "w1 w2"), ("assistant", "w3 w4"), ("user", "w8"), ("assistant", "w9 w10 w11")]
    rows = Dataset.from_list([{"messages": [{"role": role, "content": text} for role, text in turns]}] * 6)
    args = trl.SFTConfig(str(tmp_path), assistant_only_loss=True, **SETTINGS)
    trainer = adapters.SFTTrainer(
        model=tiny_llama(2), args=args, train_dataset=rows, processing_class=tokenizer, teacher=tiny_llama(1)
    )
    trainer.train()
    assert trainer.ledger.tokens == 6 * (3 + 4)  # with the end of each turn


@pytest.mark.parametrize("lmbda", [0.0, 1.0])
def test_gkd_is_the_mean_over_the_text_that_was_written(lmbda: float, tmp_path: Path) -> None:
    """Against our own engine on the very text; TRL's beta and temperature keep their meaning."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": f"w{i} w2 w3"}, {"role": "assistant", "content": f"w{i} w{i + 1}"}]}
         for i in range(6)]
    )  # fmt: skip
    from trl.experimental.gkd import GKDConfig

    args = GKDConfig(str(tmp_path), lmbda=lmbda, beta=0.25, max_new_tokens=5, max_length=24, **SETTINGS)
    student, teacher = tiny_llama(2).double(), tiny_llama(1).double()
    trainer = adapters.GKDTrainer(student, teacher, args, train_dataset=rows, processing_class=tokenizer)
    assert trainer.ledger.objective.divergence is not None
    batches: list[Any] = []
    begin = trainer.ledger.begin
    trainer.ledger.begin = lambda micro, first=None: batches.extend(micro) or begin(micro, first)
    ours = trained_step(trainer)
    objective = Objective({"name": "generalized_jsd", "beta": 0.25})
    same(ours, plain_step(tiny_llama(2).double(), teacher, objective, batches, "token_mean"))
    written = max(len(one) for batch in batches for one in batch.samples())
    assert (written > 8) == (lmbda == 1.0)


def test_trl_s_distillation_trainer_keeps_its_text_and_has_our_loss(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    rows = Dataset.from_list([{"prompt": f"w{i} w2 w3"} for i in range(6)])
    args = trl.DistillationConfig(str(tmp_path), max_completion_length=5, beta=0.0, **SETTINGS)
    trainer = adapters.DistillationTrainer(
        model=tiny_llama(2), teacher_model=tiny_llama(1), args=args, train_dataset=rows, processing_class=tokenizer,
        objective=Objective("forward_kl", {"name": "greedy_topk", "k": 9}, 0.1),
    )  # fmt: skip
    seen: list[Any] = []
    plain = trainer._compute_loss

    def kept(student: Any, inputs: Any, count: Any) -> Any:
        seen.append((inputs, count))
        return plain(student, inputs, count)

    trainer._compute_loss = kept
    ours = trained_step(trainer)
    student, teacher = tiny_llama(2), tiny_llama(1)
    objective, n = Objective("forward_kl", {"name": "greedy_topk", "k": 9}, 0.1), float(seen[0][1])
    for inputs, _ in seen:
        prompts, completions = (
            [
                row[keep.bool()].tolist()
                for row, keep in zip(inputs[f"{x}_ids"], inputs[f"{x}_mask"], strict=True)
            ]
            for x in ("prompt", "completion")
        )
        batch = collate(
            [
                Example(p + c, [False] * len(p) + [True] * len(c))
                for p, c in zip(prompts, completions, strict=True)
            ],
            pad_id=0,
        )
        position = supervised(batch).position
        logits = [
            m(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            for m in (teacher, student)
        ]
        logp, logq = (one.flatten(0, 1)[position].log_softmax(-1) for one in logits)
        accepted = (logp > logp.gather(1, logq.argmax(1, keepdim=True))).sum(1) < 9
        weight = torch.where(accepted, 1.0, 0.1)
        assert objective.beta == 0.1
        ((weight * (logp.exp() * (logp - logq)).sum(-1)).sum() / n).backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            ours[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name
        )  # fp32, another order
    assert 0.0 <= trainer.state.log_history[0]["tar"] <= 1.0
