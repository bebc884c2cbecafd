"""What a run refuses, the doctor refuses: the same words and exit code, from both before a weight loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoModelForCausalLM

from faults.tiny_run import recipe_for
from selectkd.cli import main
from training.tiny import VOCABULARY, WORDS, tiny_llama, tiny_tokenizer

Change = Callable[[Path], dict[str, Any]]
"""What a recipe gets instead of its own, from a folder that the change may write to."""


def saved(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    (model or tiny_llama(2)).save_pretrained(folder)
    (tokenizer or tiny_tokenizer()).save_pretrained(folder)
    return folder


def edited(role: str = "student", **changed: Any) -> Change:
    """A model folder whose config.json says something else."""

    def made(folder: Path) -> dict[str, Any]:
        path = saved(folder / "edited") / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
        return {role: {"model": str(folder / "edited")}}

    return made


def of_type(config: Any, role: str = "student", **sections: Any) -> Change:
    """A tiny model of another type, its configuration alone beside a file that claims to be its weights."""

    def made(folder: Path) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_config(config)
        return {role: {"model": str(saved(folder / "other", model))}, **sections}

    return made


def without(*names: str) -> Change:
    def made(folder: Path) -> dict[str, Any]:
        for path in saved(folder / "less").iterdir():
            if path.name in names:
                path.unlink()
        return {"student": {"model": str(folder / "less")}}

    return made


def beside(name: str, content: str) -> Change:
    def made(folder: Path) -> dict[str, Any]:
        (saved(folder / "more") / name).write_text(content)
        return {"student": {"model": str(folder / "more")}}

    return made


def text(content: str) -> Change:
    def made(folder: Path) -> dict[str, Any]:
        (folder / "own.jsonl").write_text(content)
        return {"data": {"sources": [{"path": str(folder / "own.jsonl")}]}}

    return made


def cache(**changed: Any) -> Change:
    """A cache of the recipe's text, and then a recipe that it is not for."""

    def made(folder: Path) -> dict[str, Any]:
        teacher = {"cache": str(folder / "cache"), "model": None, "payload": "top_k", "k": 12}
        return {"teacher": teacher, "built": True, "objective": {"verifier": VERIFIER}, **changed}

    return made


def swapped(folder: Path) -> dict[str, Any]:
    other = tiny_tokenizer([WORDS[1], WORDS[0], *WORDS[2:]])
    return {"student": {"model": str(saved(folder / "swapped", tokenizer=other))}}


def given(**sections: Any) -> Change:
    return lambda _: sections


VERIFIER = {"name": "greedy_topk", "k": 5}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
PACKED = {"data": {"packing": True}}
ROW = '{"prompt": "w1", "completion": " w2"}\n'

CASES: dict[str, Change] = {
    "no such student": given(student={"model": "./nowhere"}),
    "no such teacher": given(teacher={"model": "./nowhere"}),
    "no configuration": without("config.json"),
    "no weights": without("model.safetensors"),
    "no tokenizer": without("tokenizer.json", "tokenizer_config.json"),
    "code": edited(auto_map={"AutoModel": "x.Y"}),
    "a teacher's code": edited("teacher", auto_map={"AutoModel": "x.Y"}),
    "an unknown type": edited(model_type="grok9"),
    "more layers than there are": edited(num_hidden_layers=3),
    "another width": edited("teacher", hidden_size=64),
    "another vocabulary": edited(vocab_size=80),
    "MXFP4": edited(quantization_config={"quant_method": "mxfp4"}),
    "GPTQ": edited("teacher", quantization_config={"quant_method": "gptq", "bits": 4}),
    "an adapter beside whole weights": beside("adapter_config.json", "{}"),
    "an encoder and decoder": of_type(transformers.BartConfig(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16,
    ), **PACKED),
    "packing and a state": of_type(transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4,
    ), **PACKED),
    "packing and a teacher's state": of_type(transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4,
    ), "teacher", **PACKED),
    "two ids swapped": swapped,
    "no text": given(data={"sources": [{"path": "nowhere.jsonl"}]}),
    "empty text": text(""),
    "a row that is cut off": text(ROW + '{"prompt": "w'),
    "a field of another type": text('{"prompt": 3, "completion": " w2"}\n'),
    "a conversation without a template": text('{"messages": [{"role": "user", "content": "w1"}, '
                                              '{"role": "assistant", "content": "w2"}]}\n'),
    "nothing to train on": text('{"prompt": "w1", "completion": ""}\n'),
    "nothing held out": given(data={"evaluation": 0.01}),
    "k beyond the vocabulary": given(objective={"verifier": {"name": "greedy_topk", "k": 99}}),
    "no such divergence": given(objective={"divergence": "forward_lk"}),
    "an unknown parameter": given(objective={"verifier": {"name": "greedy_topk", "kk": 3}}),
    "a module of one's own": given(objective={"verifier": "os:system"}),
    "a selector without a reference": given(objective={"verifier": "adaspec"}),
    "adapters on no module": given(training={"lora": {"r": 2, "target_modules": ["nowhere"]}}),
    "adapters on the head": given(training={"lora": {"r": 2, "target_modules": ["lm_head"]}}),
    "a cut of more layers": given(student={"model": None, "from_teacher": {"layers": 9}}),
    "a cut of layers that are not there": given(
        student={"model": None, "from_teacher": {"layers": 1, "choose": [7]}}),
    "quantization without its package": given(teacher={"quantization": "bitsandbytes-4bit"}),
    "attention without its package": given(student={"attn_implementation": "flash_attention_2"}),
    "a teacher's attention": given(teacher={"attn_implementation": "flash_attention_2"}),
    "a logger that is not installed": given(training={"report_to": ["wandb"]}),
    "an optimizer without its package": given(training={"optimizer": "adamw_8bit"}),
    "a revision of a folder": given(student={"revision": "main"}),
    "a reference that is not there": given(reference={"model": "./nowhere"}),
    "no such cache": given(teacher={"model": None, "cache": "./nowhere"}),
    "a cache and more candidates": cache(objective={"verifier": {"name": "greedy_topk", "k": 20}}),
    "a cache and a temperature": cache(objective={"verifier": VERIFIER, "temperature": 2.0}),
    "a cache and other text": cache(data={"train_on": "all"}),
    "a cache and text written anew": cache(data={"policy": "student"}),
    "a cache and a reference": cache(reference={"model": "STUDENT"}),
    "a server that is away": given(teacher={
        "model": None, "url": "http://127.0.0.1:9", "kind": "vllm", "tokenizer": "TEACHER", "k": 8, "wait": 0}),
    "a key that is not set": given(teacher={
        "model": None, "url": "http://127.0.0.1:9", "kind": "vllm", "tokenizer": "TEACHER", "k": 8,
        "api_key_env": "SELECTKD_NO_SUCH_KEY"}),
    "shards without ranks": given(training={"sharding": {}}),
    "a prompt longer than all": given(training={"max_prompt_length": 64}),
    "a folder that is not empty": given(training={"output_dir": "FULL"}),
}  # fmt: skip


@pytest.fixture
def recipe(pair: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """A recipe file of the tiny pair with a change."""

    def merged(own: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
        made = dict(own)
        for key, value in changes.items():
            kept = isinstance(value, dict) and isinstance(made.get(key), dict) and "name" not in value
            made[key] = merged(made[key], value) if kept else value
            if made[key] is None:
                del made[key]
        return made

    def written(changes: dict[str, Any]) -> Path:
        own = recipe_for(pair, tmp_path / "run").model_dump(mode="json", exclude_unset=True)
        full = tmp_path / "full"
        content = json.dumps(merged(own, changes))
        for word, path in (("FULL", full), ("STUDENT", pair / "student"), ("TEACHER", pair / "teacher")):
            content = content.replace(f'"{word}"', json.dumps(str(path)))
        full.mkdir(exist_ok=True)
        (full / "thesis.tex").touch()
        path = tmp_path / "recipe.yaml"
        path.write_text(content)
        return path

    def made(change: Change) -> Path:
        changes = change(tmp_path)
        if changes.pop("built", False):
            teacher = {**changes["teacher"], "model": str(pair / "teacher")}
            build = written({"teacher": teacher, "objective": {"verifier": VERIFIER}})
            assert main(["cache", "build", str(build)]) == 0
        return written(changes)

    return made


@pytest.mark.parametrize("case", CASES)
def test_doctor_and_train_refuse_a_recipe_in_the_same_words_before_a_weight_loads(
    case: str, recipe: Callable[[Change], Path], capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = recipe(CASES[case])
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    capsys.readouterr()
    code = main(["doctor", str(path), "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    told = [row["message"] for row in found if not row["ok"]]
    trained = main(["train", str(path)])
    error = capsys.readouterr().err
    assert trained in (2, 3, 4, 5) and code == trained
    assert any(" ".join(one.split()) in " ".join(error.split()) for one in told), (told, error)
    assert not (path.parent / "run").exists()
