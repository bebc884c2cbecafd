"""Other trainers' words are answered with ours: keys, values, and the ways to write a command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from selectkd.cli import main
from selectkd.config import recipe_from
from selectkd.config.keys import keys
from selectkd.config.words import VALUES, WORDS, instead
from selectkd.errors import ConfigError

RECIPE = {
    "teacher": {"model": "no/such/teacher"},
    "student": {"model": "no/such/student"},
    "data": {"sources": [{"path": "c.jsonl"}]},
    "training": {"output_dir": "r", "max_steps": 2, "batch_size": 2},
}
ASKED = (
    "lr num_train_epochs per_device_train_batch_size gradient_accumulation_steps resume_from_checkpoint val_set_size "
    "fp16 bf16 float16 bfloat16 lora_r max_seq_length warmup_steps eval_steps save_steps logging_steps lmbda seq_kd "
    "base_model datasets torch_dtype optim micro_batch_size sequence_len cutoff_len"
)


def refused(*overrides: str, **changed: object) -> str:
    with pytest.raises(ConfigError) as caught:
        recipe_from({**RECIPE, **changed}, overrides)
    return str(caught.value)


def test_every_word_of_another_trainer_is_answered_with_a_key_of_ours() -> None:
    for word, (key, note) in WORDS.items():
        assert key in keys(), word
        for named in re.findall(r"\b(?:teacher|data|training|objective)\.[\w.]*\w", note):
            assert named in keys(), named
        if word not in keys():
            assert f"Write {key}." in refused(f"{word}=1") and f"Write {key}." in refused(**{word: 1})
        assert note in instead(["training", word])


def test_the_words_that_people_type_first_are_in_the_table() -> None:
    assert set(ASKED.split()) <= set(WORDS)


def test_no_sentence_about_a_word_is_longer_than_25_words() -> None:
    for word in WORDS:
        for sentence in re.split(r"(?<=[.;])\s", instead([word])):
            assert len(sentence.split()) <= 25, sentence


def test_a_key_in_the_wrong_place_is_answered_with_its_place() -> None:
    names = [key.rpartition(".")[2] for key in keys()]
    for key, name in zip(keys(), names, strict=True):
        if names.count(name) == 1 and name not in WORDS:
            assert instead(["elsewhere", name]) == f" It belongs at {key}."
    assert instead(["url"]) == " It belongs at teacher.url."
    assert instead(["anything"]) == ""
    assert "Leave it out" in instead(["training", "engine"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("output_dir=x", "It belongs at training.output_dir."),
        ("training.precision=bfloat16", "Write bf16."),
        ("training.precision=fp16", "Write bf16."),
        ("training.optimizer=adamw_torch", "Write adamw."),
        ("training.schedule=constant_with_warmup", "Write constant."),
        ("training.report_to=wandb", "must be a list, such as [wandb]"),
        ("training.lora=true", "{} takes its defaults"),
        ("teacher=Qwen/Qwen2-7B", "{model: 'Qwen/Qwen2-7B'}"),
        ("data=a.jsonl", "{sources: [{path: 'a.jsonl'}]}"),
        ("objective.by_writer.nobody.beta=0", "there is no objective.by_writer.nobody"),
    ],
)
def test_a_value_in_another_form_is_answered_with_ours(override: str, words: str) -> None:
    assert words in refused(override)


def test_every_value_of_ours_is_one_that_some_key_takes() -> None:
    for theirs, ours in VALUES.items():
        taken = [
            key
            for key in ("training.precision", "training.optimizer", "training.schedule", "objective.reduction",
                        "data.train_on")
            if f"Write {ours}." in refused(f"{key}={theirs}", "training.seed=x")
        ]  # fmt: skip
        assert taken, theirs


def test_overrides_reach_the_objective_of_one_writer_and_all_linear_is_taken() -> None:
    changes = ["objective.by_writer.student.weight=0", "training.lora.target_modules=all-linear"]
    recipe = recipe_from(RECIPE, changes)
    assert recipe.objective.by_writer["student"].weight == 0  # type: ignore[union-attr]
    assert recipe.training.lora is not None and recipe.training.lora.target_modules == "all-linear"


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "r.yaml"
    path.write_text(str(RECIPE), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    "command",
    [
        "train --config FILE training.seed=x",
        "train training.seed=x --config=FILE",
        "train --resume never training.seed=x FILE",
        "estimate FILE training.seed=x",
        "doctor FILE --set training.seed=x",
        "cache build --config FILE training.seed=x",
    ],
)
def test_config_is_the_recipe_and_a_key_with_a_value_is_a_change(command: str, file: str, capsys) -> None:
    assert main([word.replace("FILE", file) for word in command.split()]) == 2
    out, err = capsys.readouterr()
    assert "training.seed = 'x' must be an integer" in out + err


def test_a_file_whose_name_has_an_equals_sign_is_no_change(
    tmp_path: Path, file: str, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(file).rename("seed=1.yaml")
    assert main(["train", "seed=1.yaml", "training.seed=x"]) == 2
    assert "must be an integer" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--learning_rate", "--num_train_epochs=3", "--output_dir"])
def test_a_key_that_is_written_as_an_option_is_answered_with_the_key(option: str, file: str, capsys) -> None:
    assert main(["train", file, option, "1"]) == 2
    assert "training." in (told := capsys.readouterr().err) and "without dashes" in told


@pytest.mark.parametrize("command", ["train --config", "train FILE more", "train FILE --resme never"])
def test_a_wrong_command_is_still_one(command: str, file: str, capsys) -> None:
    assert main([word.replace("FILE", file) for word in command.split()]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"teacher": {"cache": "c", "placement": "offloaded"}}, "teacher.placement is not a key of a cache,"),
        (
            {"teacher": {"model": "m", "adapters_off": True}},
            "teacher.model is not a key of the student's base,",
        ),
        (
            {"teacher": [{"model": "m", "payload": "top_k", "weight": 1}, {"model": "n", "weight": 1}]},
            "teacher.0.payload is not a key of a model,",
        ),
        (
            {"data": {"sources": [{"path": "x"}], "policy": {"name": "teacher", "replay": 3}}},
            "data.policy.replay is not a key of the policy teacher,",
        ),
    ],
)
def test_a_key_of_another_kind_is_refused_with_the_kind_that_is_meant(
    changed: dict[str, object], words: str
) -> None:
    assert words in refused(**changed) and "belongs at" not in refused(**changed)


def test_an_override_that_is_refused_leaves_no_second_fault_behind() -> None:
    found = refused("training.betas.1=0.95")
    assert "only a list has numbered items" in found and "must be a list" not in found
