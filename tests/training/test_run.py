"""A whole run from a recipe: what it leaves behind, what it refuses, and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from selectkd.config import load_recipe, recipe_from
from selectkd.config.departures import departure_warnings, departures
from selectkd.errors import ConfigError
from selectkd.training.record.card import Facts, model_card
from selectkd.training.record.metrics import REQUIRED
from selectkd.training.run import train
from training.tiny import VOCABULARY, WORDS, tiny_llama, tiny_tokenizer, write_pair

PLAIN_KD = {"divergence": "forward_kl", "verifier": "always", "beta": 1.0}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: Any) -> Path:
    """A teacher, a student and text on disk."""
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=4))
    return root


@pytest.fixture
def recipe(folders: Path, tmp_path: Path) -> Callable[..., Any]:
    """A recipe for the tiny pair with sections changed: recipe(training={...})."""

    def made(**changed: dict[str, Any]) -> Any:
        content: dict[str, Any] = {
            "teacher": {"model": str(folders / "teacher")},
            "student": {"model": str(folders / "student")},
            "data": {"sources": [{"path": str(folders / "text.jsonl"), "name": "made"}], "evaluation": 0.25},
            "objective": {"verifier": {"name": "greedy_topk", "k": 20}, "beta": 0.1},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "max_steps": 4,
                "batch_size": 3,
                "learning_rate": 1e-2,
                "max_length": 32,
                "max_prompt_length": 16,
                "evaluate_every": 2,
            },
        }
        for section, values in changed.items():
            replaces = section in ("objective", "student")
            content[section] = values if replaces else {**content.get(section, {}), **values}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        return load_recipe(path, [])

    return made


class Heard:
    """A listener in the place of the progress bar."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.lines: list[dict[str, Any]] = []

    def stage(self, name: str, total: int | None = None) -> None:
        self.stages.append(name)

    def line(self, line: dict[str, Any]) -> None:
        self.lines.append(line)


def test_a_run_leaves_its_manifest_metrics_and_a_student_that_loads(
    recipe: Callable[..., Any], capsys: Any
) -> None:
    heard = Heard()
    result = train(recipe(objective=PLAIN_KD), progress=heard)
    run = result.run_dir
    names = [".lock", "manifest.json", "metrics.jsonl", "probe", "run.json", "student", "timings.jsonl"]
    assert sorted(path.name for path in run.iterdir()) == names
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [
        line | {"tokens_per_second": None, "peak_bytes": None} for line in heard.lines if "loss" in line
    ] == [line for line in lines if "loss" in line]
    assert "training" in heard.stages
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(set(REQUIRED) <= set(line) for line in steps)
    looks = [line for line in lines if "evaluation" in line]
    assert [line["step"] for line in looks] == [0, 2, 4]
    assert all("probe_tar" in line for line in looks)
    assert result.before is not None and result.after is not None and result.after.kl < result.before.kl
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    for key in ("config", "versions", "data", "tokenizer", "teacher", "seed", "device", "seconds", "tar"):
        assert manifest[key] is not None
    assert manifest["data"]["samples"] == 18 and manifest["data"]["heldout_samples"] == 6
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert torch.isfinite(student(torch.tensor([[4, 5, 6]])).logits).all()
    assert (
        AutoTokenizer.from_pretrained(run / "student")("w1")["input_ids"]
        == tiny_tokenizer()("w1")["input_ids"]
    )
    card = (run / "student" / "README.md").read_text("utf-8")
    front = yaml.safe_load(card.split("---")[1])
    assert front["selectkd"]["tar"]["after"] == pytest.approx(result.after.tar)


def test_a_cold_student_is_warned_of_with_the_remedy(recipe: Callable[..., Any], caplog: Any) -> None:
    result = train(recipe(objective={"verifier": {"name": "greedy_topk", "k": 1}}, training={"max_steps": 1}))
    assert result.before is not None and result.before.tar < 0.2
    (warning,) = result.warnings
    assert "{start: 1.0, end: 0.01, until_tar: 0.5}" in warning
    assert warning in caplog.text


def test_a_schedule_of_beta_is_not_warned_of(recipe: Callable[..., Any]) -> None:
    beta = {"start": 1.0, "end": 0.01, "until_tar": 0.5}
    objective = {"verifier": {"name": "greedy_topk", "k": 1}, "beta": beta}
    assert train(recipe(objective=objective, training={"max_steps": 1})).warnings == []


def test_a_student_cut_from_its_teacher_trains_and_says_what_was_kept(recipe: Callable[..., Any]) -> None:
    training = {"learning_rate": 1e-3, "max_steps": 8}
    result = train(recipe(student={"from_teacher": {"layers": 2}}, objective=PLAIN_KD, training=training))
    assert result.kept is not None and len(result.kept) == 2
    saved = AutoModelForCausalLM.from_pretrained(result.run_dir / "student")
    assert saved.config.num_hidden_layers == 2
    assert result.before is not None and result.after is not None and result.after.kl < result.before.kl


# peft 0.21 asks transformers by a name that goes in version 6
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_lora_with_checkpointing_and_packing_saves_a_merged_student(
    recipe: Callable[..., Any], folders: Path
) -> None:
    training = {"lora": {"r": 4, "alpha": 8, "dropout": 0.0}, "gradient_checkpointing": True}
    result = train(recipe(objective=PLAIN_KD, training=training, data={"packing": True}))
    saved = AutoModelForCausalLM.from_pretrained(result.run_dir / "student").state_dict()
    start = AutoModelForCausalLM.from_pretrained(folders / "student").state_dict()
    assert saved.keys() == start.keys()
    changed = {
        name.rpartition(".")[0].rpartition(".")[2]
        for name in saved
        if not torch.equal(saved[name], start[name])
    }
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_early_stopping_keeps_the_best_student(recipe: Callable[..., Any]) -> None:
    training = {"max_steps": 12, "learning_rate": 1.0, "evaluate_every": 1, "early_stopping": {"patience": 2}}
    result = train(recipe(training=training))
    assert result.stopped_early and result.steps < 12
    assert result.before is not None and result.after is not None
    assert result.after.kl <= result.before.kl


@pytest.mark.parametrize(
    ("objective", "told"),
    [
        ({"divergence": "forward_lk"}, "Did you mean"),
        ({"verifier": {"name": "greedy_topk", "kk": 3}}, "kk"),
        ({"verifier": {"name": "greedy_topk", "k": VOCABULARY + 1}}, "objective.verifier.k"),
        ({"always_accept": [VOCABULARY]}, "always_accept"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_before_weights(
    objective: dict[str, Any], told: str, recipe: Callable[..., Any], no_weights: None
) -> None:
    with pytest.raises(ConfigError, match=told):
        train(recipe(objective=objective))


def test_another_tokenizer_is_refused_before_weights(
    recipe: Callable[..., Any], folders: Path, tmp_path: Path, no_weights: None
) -> None:
    other = tmp_path / "other"
    tiny_llama(2).save_pretrained(other)
    tiny_tokenizer([WORDS[1], WORDS[0], *WORDS[2:]]).save_pretrained(other)
    with pytest.raises(ConfigError, match="id 4"):
        train(recipe(student={"model": str(other)}))


def test_an_output_folder_that_cannot_be_used_is_refused_before_weights(
    recipe: Callable[..., Any], tmp_path: Path, no_weights: None
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        train(recipe(training={"output_dir": str(tmp_path / "file")}))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        train(recipe(training={"output_dir": str(tmp_path / "full")}))
    (tmp_path / "full" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="another run"):
        train(recipe(training={"output_dir": str(tmp_path / "full")}))
    with pytest.raises(ConfigError, match="cannot be written"):
        train(recipe(training={"output_dir": "/proc/self/run"}))


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)


def test_a_card_with_hostile_names_parses_to_the_same_values() -> None:
    name = "x: [\n---\nlicense: stolen\n`<script>`"
    facts = Facts(
        teacher=name, student="s", data=[name], method={"k": name}, before={}, after={}, steps=1, tokens=2
    )
    card = model_card(facts)
    end = card.index("\n---\n\n# A student")
    front = yaml.safe_load(card[4:end])
    assert front["selectkd"]["teacher"] == name and "license" not in front
    assert "<script>" not in card[end:].replace("\\<", "")


HOSTILE = [
    "yes", "no", "on", "Off", "y", "N", "true", "NULL", "null", "~", "1", "0x1f", "010", "1_000", "1e5", "1:30",
    ".inf", ".nan", "2024-01-01", "<<", "=", "", " ", "- a", "a: b", "#", "'", '"', "\\n", "\n", "\t", "\x85", "\u2028",
    "\ufeff",
    "\U0001f600", "*a", "&a", "!!python/none", "%YAML", "---", "...", "{", "[", "|", ">", "@", "`", "a" * 300,
    "no " * 60,
]  # fmt: skip


def test_every_name_and_number_of_a_card_survives_both_versions_of_yaml() -> None:
    from ruamel.yaml import YAML

    numbers = [1e-05, 1e20, 1.0, 0.1, 3, True, None, -2.5e-300]
    said = {"names": HOSTILE, "numbers": numbers, **{name: name for name in HOSTILE}}
    rest = {"before": {"tar": 1e-07}, "after": {}, "steps": 1, "tokens": 2}
    card = model_card(Facts(teacher="no", student="on", data=HOSTILE, method=said, **rest))
    front = card[4 : card.index("\n---\n\n# A student")]
    for read in (yaml.safe_load(front), YAML(typ="safe", pure=True).load(front)):
        ours = read["selectkd"]
        assert (ours["teacher"], ours["student"], ours["data"]) == ("no", "on", HOSTILE)
        assert ours["method"] == said and ours["tar"]["before"] == 1e-07


@pytest.mark.parametrize(
    ("method", "said", "overridden"),
    [
        ("gkd", {"divergence": {"name": "forward_kl"}}, ["objective.divergence"]),
        ("abkd", {"divergence": {"name": "alpha_beta", "alpha": 0.9}}, ["objective.divergence.alpha"]),
        ("opd", {"reduction": "weight_mean"}, ["objective.reduction"]),
        ("selectkd-paper", {"verifier": {"name": "spec_k", "k": 5}}, ["objective.verifier"]),
        ("kd", {"selector": {"name": "tip"}}, ["objective.verifier"]),
        ("gkd", {"language_model": 0.5}, []),  # the method says nothing of it
        ({"name": "gkd", "forward_kl": True}, {"divergence": "forward_kl"}, []),
        ("kd", {}, []),
    ],
)
def test_a_recipe_that_departs_from_its_method_says_where(
    method: Any, said: Any, overridden: list[str]
) -> None:
    values = {
        "method": method,
        "teacher": {"model": "t"},
        "student": {"model": "s"},
        "data": {"sources": [{"path": "a"}]},
        "training": {"output_dir": "r", "max_steps": 1, "batch_size": 1},
        **({"objective": said} if said else {}),
    }
    recipe = recipe_from(values)
    assert list(departures(recipe)) == overridden
    assert all(key in " ".join(departure_warnings(recipe)) for key in overridden) and bool(
        departure_warnings(recipe)
    ) == bool(overridden)
    assert (
        departures(recipe_from({**values, "selection": {"verifier": "spec_k", "k": 2}, "objective": {}}))
        == {}
    )


def test_what_a_recipe_changes_of_its_method_is_in_the_manifest_the_card_and_the_warnings(
    recipe: Callable[..., Any],
) -> None:
    changed = recipe(method={"name": "abkd"}, objective={"divergence": {"name": "alpha_beta", "alpha": 0.9}})
    run = train(changed).run_dir
    manifest = json.loads((run / "manifest.json").read_text("utf-8"))
    assert manifest["overridden"] == {"objective.divergence.alpha": {"method": 0.2, "recipe": 0.9}}
    assert any("not abkd as published" in told for told in manifest["warnings"])
    front = yaml.safe_load((run / "student" / "README.md").read_text("utf-8").split("---\n")[1])
    method = front["selectkd"]["method"]
    assert method["method"]["name"] == "abkd" and method["overridden"] == {"objective.divergence.alpha": 0.9}


def test_a_selector_that_compares_with_a_reference_student_trains_with_one(
    recipe: Callable[..., Any], folders: Path
) -> None:
    objective = {"selector": {"name": "adaspec"}, "beta": 0.0}
    with pytest.raises(ConfigError, match=r"reference: \{model"):
        train(recipe(objective=objective))
    path = {"reference": {"model": str(folders / "student")}}
    result = train(recipe(objective=objective, **path))
    assert result.steps == 4 and result.skipped == 0


def test_taid_follows_its_schedule_to_forward_kl(recipe: Callable[..., Any]) -> None:
    result = train(recipe(objective={"divergence": {"name": "taid"}, "verifier": {"name": "always"}}))
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps[0]["divergence"] < steps[0]["kl"]  # t = .4: the target is near the student
    assert steps[-1]["divergence"] / steps[-1]["kl"] > steps[0]["divergence"] / steps[0]["kl"]


def test_a_logger_that_is_not_installed_is_refused_before_weights(recipe: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="clearml"):
        train(recipe(training={"report_to": ["clearml"]}))
