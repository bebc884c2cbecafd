"""DistillTrainer and DistillConfig: TRL's way in trains as a recipe does, from names and from objects."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainerCallback, TrainingArguments

from faults.on_two_ranks import run_on_two_ranks
from selectkd import DistillConfig, DistillTrainer
from selectkd.config import recipe_from
from selectkd.errors import ConfigError, DataError
from selectkd.teachers import LiveTeacher
from selectkd.training.run import train
from training.distill_program import distilled
from training.tiny import recipe_of, tiny_llama, tiny_tokenizer, write_pair

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
VERIFIER = {"name": "greedy_topk", "k": 20}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=3))
    return root


@pytest.fixture
def rows(pair: Path) -> Dataset:
    return Dataset.from_list(
        [json.loads(line) for line in (pair / "text.jsonl").read_text("utf-8").splitlines()]
    )


def config(folder: Path, **changed: Any) -> DistillConfig:
    settings = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 3, "per_device_eval_batch_size": 3,
        "learning_rate": 1e-3,
        "gradient_accumulation_steps": 2, "max_length": 32, "max_prompt_length": 16, "verifier": VERIFIER,
        "beta": 0.1, "use_cpu": True, "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "optim": "adamw_torch", "lr_scheduler_type": "cosine",
    }  # fmt: skip
    return DistillConfig(**(settings | changed))


def begun(pair: Path, args: DistillConfig, rows: Any, **changed: Any) -> DistillTrainer:
    given = {
        "model": str(pair / "student"),
        "teacher": str(pair / "teacher"),
        "train_dataset": rows,
    } | changed
    return DistillTrainer(args=args, **given)


def losses(trainer: DistillTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize(
    "changed", [{}, {"divergence": {"name": "skew_kl", "alpha": 0.2}, "temperature": 2.0}]
)
def test_it_trains_as_the_recipe_of_the_same_values_does(
    changed: dict[str, Any], pair: Path, rows: Dataset, tmp_path: Path
) -> None:
    recipe = recipe_of(
        pair,
        data={"evaluation": {"path": str(pair / "text.jsonl")}},
        objective={"verifier": VERIFIER, "beta": 0.1, **changed},
        training={
            "output_dir": str(tmp_path / "recipe"), "max_steps": 4, "batch_size": 3, "gradient_accumulation": 2,
            "learning_rate": 1e-3, "max_length": 32, "max_prompt_length": 16, "warmup_ratio": 0.0,
        },
    )  # fmt: skip
    result = train(recipe_from(recipe), device="cpu")
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    trainer = begun(pair, config(tmp_path / "trainer", **changed), rows, eval_dataset=rows)
    before = trainer.evaluate()
    trainer.train()
    assert losses(trainer) == [line["loss"] for line in lines if "loss" in line]
    after = trainer.evaluate()
    for found, one in ((before, result.before), (after, result.after)):
        assert one is not None
        assert {name: found[f"eval_{name}"] for name in ("kl", "tar", "overlap", "perplexity")} == {
            "kl": one.kl, "tar": one.tar, "overlap": one.overlap, "perplexity": one.perplexity,
        }  # fmt: skip
    trainer.save_model(str(tmp_path / "student"))
    theirs = AutoModelForCausalLM.from_pretrained(result.run_dir / "student").state_dict()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_models_and_records_as_objects_train_as_their_names_do(
    pair: Path, rows: Dataset, tmp_path: Path
) -> None:
    named = begun(pair, config(tmp_path / "a"), rows)
    teacher = tiny_llama(1, layers=3)
    for given in (teacher, LiveTeacher(teacher)):
        held = begun(
            pair, config(tmp_path / "b"), list(rows), model=tiny_llama(2), teacher=given,
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        held.train()
        if not named.state.log_history:
            named.train()
        assert losses(named) == losses(held)


def test_the_eval_strategy_measures_held_out_text(pair: Path, rows: Dataset, tmp_path: Path) -> None:
    messages = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": r["completion"]},
                ]
            }
            for r in map(dict, rows)
        ]
    )
    heard: list[dict[str, float]] = []

    class Hears(TrainerCallback):
        def on_evaluate(self, *_: Any, metrics: Any, **__: Any) -> None:
            heard.append(metrics)

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    args = config(tmp_path, eval_strategy="steps", eval_steps=2, num_train_epochs=1, max_steps=-1)
    trainer = begun(
        pair, args, messages, eval_dataset=messages.select(range(6)), callbacks=[Hears()],
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 4 and len(heard) == 2
    assert heard[1]["eval_kl"] < heard[0]["eval_kl"] and 0 <= heard[0]["eval_tar"] <= 1


def test_adapters_of_a_peft_config_train_alone(pair: Path, rows: Dataset, tmp_path: Path) -> None:
    names = [field.name for field in fields(TrainingArguments)]
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    trainer = begun(
        pair, config(tmp_path, **{name: True}), rows,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
    )  # fmt: skip
    trainer.train()
    trained = [name for name, p in trainer.student.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()


def test_a_run_that_stopped_goes_on_to_the_same_bits(pair: Path, rows: Dataset, tmp_path: Path) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 2

    whole = begun(pair, config(tmp_path / "whole"), rows)
    whole.train()
    saving = {"save_strategy": "steps", "save_steps": 1}
    begun(pair, config(tmp_path / "cut", **saving), rows, callbacks=[Stops()]).train()
    with pytest.raises(ConfigError, match="holds checkpoints of a run"):
        begun(pair, config(tmp_path / "cut", **saving), rows).train()
    again = begun(pair, config(tmp_path / "cut", **saving), rows)
    again.train(resume_from_checkpoint=True)
    assert losses(again) == losses(whole)[2:]
    for one, other in zip(again.student.parameters(), whole.student.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_goes_on_with_the_values_it_began_with_or_those_allowed_by_name(
    pair: Path, rows: Dataset, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    begun(pair, config(tmp_path, **saving), rows).train()

    def again(data: Any = rows, allow: tuple[str, ...] = (), **changed: Any) -> DistillTrainer:
        trainer = begun(pair, config(tmp_path, **saving | changed), data)
        trainer.train(resume_from_checkpoint=True, allow_change=allow)
        return trainer

    for changed, words in (
        ({"beta": 0.5}, r"objective\.beta: 0\.1 in the run, 0\.5 now\n.*output_dir.*allow_change"),
        ({"divergence": "reverse_kl"}, "objective\\.divergence\\.name"),
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 in the run"),
        ({"data": list(rows)[1:]}, "text: "),
    ):
        with pytest.raises(ConfigError, match=words):
            again(**changed)
    assert again(max_steps=2, allow=("max_steps",)).state.global_step == 2


def test_adapters_go_on_upon_the_weights_that_they_began_on(
    pair: Path, rows: Dataset, tmp_path: Path
) -> None:
    def on_student(seed: int) -> DistillTrainer:
        return begun(
            pair, config(tmp_path, save_strategy="steps", save_steps=1, max_steps=1), rows, model=tiny_llama(seed),
            peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip

    on_student(2).train()
    with pytest.raises(ConfigError, match="student_weights"):
        on_student(3).train(resume_from_checkpoint=True)
    on_student(2).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"verifier": {"name": "greedy_topk", "k": 65}}, r"65 best tokens; the vocabulary has 64.*k to 64"),
        (
            {"verifier": None, "selector": "adaspec"},
            r"adaspec compares with a reference.*reference=LiveTeacher",
        ),
    ],
)
def test_an_objective_that_the_models_cannot_give_is_refused_before_weights_load(
    changed: dict[str, Any],
    words: str,
    pair: Path,
    rows: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=words):
        begun(pair, config(tmp_path, **changed), rows)


def test_two_ranks_train_as_one_process(pair: Path, tmp_path: Path) -> None:
    """The program of a user, started by torchrun: text, loss, checkpoints, evaluation and the saved student."""
    run_on_two_ranks(Path(__file__).with_name("distill_program.py"), str(pair), str(tmp_path / "two"))
    alone = distilled(pair, tmp_path / "one", accumulation=2)
    two = json.loads((tmp_path / "two" / "measures.json").read_text("utf-8"))
    for name in ("eval_kl", "eval_tar"):
        assert two[name] == pytest.approx(alone[name], rel=1e-4), name
    weights, theirs = (load_file(tmp_path / run / "student" / "model.safetensors") for run in ("one", "two"))
    for name, weight in weights.items():
        torch.testing.assert_close(theirs[name], weight, rtol=1e-4, atol=2e-5, msg=name)
    saved = [
        sorted(path.name for path in (tmp_path / run / "checkpoints").iterdir()) for run in ("one", "two")
    ]
    assert saved[0] == saved[1] and len(saved[0]) == 2


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"beta": 1.5}, "beta"),
        ({"max_length": 8}, "max_prompt_length"),
        ({"save_strategy": "epoch"}, "save_strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end",
        ),
    ],
)  # fmt: skip
def test_a_value_that_cannot_work_is_refused_by_the_config(
    changed: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(tmp_path, **changed)


def test_what_it_cannot_train_on_is_refused_with_what_works(
    pair: Path, rows: Dataset, tmp_path: Path
) -> None:
    for data, words in (
        (None, "Pass a datasets.Dataset"), ("text.jsonl", "load_dataset"), ({"train": rows}, "splits train"),
        ([{"question": "w1"}], r"train_dataset\[0\]: no known format"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=words):
            begun(pair, config(tmp_path), data)
    with pytest.raises(ConfigError, match=r"selectkd\.DistillConfig"):
        begun(pair, TrainingArguments(str(tmp_path), use_cpu=True), rows)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="forward_kl"):
        begun(pair, config(tmp_path, divergence="forward_kll"), rows)
    with pytest.raises(ConfigError, match="processing_class"):
        begun(pair, config(tmp_path), rows, model=tiny_llama(2))
    with pytest.raises(ConfigError, match="eval_dataset"):
        begun(pair, config(tmp_path), rows).evaluate()


def test_a_command_line_parser_takes_the_config(tmp_path: Path) -> None:
    kind: Any = DistillConfig
    (args,) = HfArgumentParser(kind).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--divergence", "reverse_kl", "--beta", "0.5", "--use_cpu"]
    )
    assert (args.divergence, args.beta) == ("reverse_kl", 0.5)


def test_the_readmes_example_runs(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in re.findall(r"```py\n(.*?)```", README, re.S) if "DistillTrainer" in block)
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "heldout.jsonl"):
        (tmp_path / name).write_bytes((pair / "text.jsonl").read_bytes())
    for name, kind in (("135M", "student"), ("360M", "teacher")):
        assert f"HuggingFaceTB/SmolLM2-{name}-Instruct" in code
        code = code.replace(f"HuggingFaceTB/SmolLM2-{name}-Instruct", str(pair / kind))
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "runs/small/student") is not None


def test_an_epoch_is_a_pass_over_the_text_before_and_after_a_stop(
    pair: Path, rows: Dataset, tmp_path: Path
) -> None:
    class Stops(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 3

    def of(folder: str, **changed: Any) -> DistillTrainer:
        args = config(
            tmp_path / folder, max_steps=-1, num_train_epochs=3, save_strategy="steps", save_steps=1,
            gradient_accumulation_steps=1, eval_strategy="epoch",
        )  # fmt: skip
        return begun(pair, args, rows.select(range(6)), eval_dataset=rows.select(range(3)), **changed)

    def measured(trainer: DistillTrainer) -> list[tuple[int, float]]:
        lines = [line for line in trainer.state.log_history if "eval_kl" in line]
        return [(line["step"], line["epoch"]) for line in lines]

    whole = of("whole")
    whole.train()
    assert measured(whole) == [(2, 1.0), (4, 2.0), (6, 3.0)]
    passed = [line["epoch"] for line in whole.state.log_history if "loss" in line]
    assert passed == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    of("cut", callbacks=[Stops()]).train()
    again = of("cut")
    again.train(resume_from_checkpoint=True)
    assert measured(again) == [(4, 2.0), (6, 3.0)]
    assert [line["epoch"] for line in again.state.log_history if "loss" in line] == passed[3:]


def test_adapters_begin_as_the_seed_says(pair: Path, rows: Dataset, tmp_path: Path) -> None:
    def first_of(seed: int) -> torch.Tensor:
        torch.rand(1)  # whatever a program has drawn before
        adapters = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        student = begun(pair, config(tmp_path, seed=seed), rows, peft_config=adapters).student
        return next(p for name, p in student.named_parameters() if "lora_A" in name)

    torch.manual_seed(5)
    assert torch.equal(first_of(1), first_of(1)) and not torch.equal(first_of(1), first_of(2))


def test_noise_on_embeddings_is_refused(pair: Path, rows: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neftune_noise_alpha = 5"):
        begun(pair, config(tmp_path, neftune_noise_alpha=5), rows)
