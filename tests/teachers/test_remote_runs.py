"""A run with a teacher behind HTTP against the same run with the teacher in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import ConfigError, DataError, TeacherError
from selectkd.models.load import load_model
from selectkd.training.run import train
from teachers.served import Served, on_a_port
from teachers.test_cached_runs import losses
from training.tiny import VOCABULARY, WORDS, tiny_tokenizer

Made = Callable[..., str]


@pytest.fixture(scope="session")
def model(pair: Path) -> Any:
    return load_model(str(pair / "teacher")).model


def at(url: str, pair: Path, kind: str = "vllm", **keys: Any) -> dict[str, Any]:
    return {"url": url, "kind": kind, "tokenizer": str(pair / "teacher"), "k": VOCABULARY, **keys}


@pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
def test_a_run_with_all_tokens_of_a_server_has_the_losses_of_a_live_teacher(
    recipe: Made, pair: Path, model: Any, kind: str
) -> None:
    live = losses(recipe({"model": str(pair / "teacher")}, run="live"))
    with on_a_port(Served(model, kind)) as url:
        remote = losses(recipe(at(url, pair, kind), run="remote"))
    torch.testing.assert_close(remote, live, rtol=0, atol=1e-5)


def test_samples_can_be_routed_to_two_servers(recipe: Made, pair: Path, model: Any) -> None:
    alone = losses(recipe({"model": str(pair / "teacher")}, run="live"))
    with on_a_port(Served(model, "vllm")) as one, on_a_port(Served(model, "sglang")) as two:
        path = recipe({"model": str(pair / "teacher")}, run="two")
        content = yaml.safe_load(Path(path).read_text())
        text = content["data"]["sources"][0]["path"]
        content["data"]["sources"] = [
            {"path": text, "name": "a", "limit": 12},
            {"path": text, "name": "b", "limit": 12},
        ]
        content["teacher"] = [
            {**at(one, pair), "streams": ["a"]},
            {**at(two, pair, "sglang"), "streams": ["b"]},
        ]
        Path(path).write_text(yaml.safe_dump(content))
        both = losses(path)
        content["teacher"] = {"model": str(pair / "teacher")}
        content["training"]["output_dir"] += "-live"
        Path(path).write_text(yaml.safe_dump(content))
        torch.testing.assert_close(both, losses(path), rtol=0, atol=1e-5)
    assert len(both) == len(alone)


def test_text_that_is_longer_than_the_server_takes_is_refused(recipe: Made, pair: Path, model: Any) -> None:
    served = Served(model, "vllm")
    served.fault = lambda path, answer: (
        200,
        {},
        answer[2].replace(b'"max_model_len": 64', b'"max_model_len": 13'),
    )
    with on_a_port(served) as url, pytest.raises(DataError, match="takes 12"):
        train(load_recipe(recipe(at(url, pair)), []))


def test_a_server_of_another_tokenizer_is_refused_before_it_is_asked(
    recipe: Made, pair: Path, tmp_path: Path
) -> None:
    tiny_tokenizer([*WORDS[1:], WORDS[0]]).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    teacher = {"url": "http://127.0.0.1:9", "kind": "vllm", "k": 12, "tokenizer": str(tmp_path / "other")}
    with pytest.raises(ConfigError, match="different tokenizers"):
        train(load_recipe(recipe(teacher), []))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "vllm", "tokenizer": "x"}, "set their number, for example k: 32"),
        ({"kind": "sglang", "k": 9}, "tokenizer: FOLDER"),
        ({"kind": "tgi", "k": 9}, "must be 'vllm', 'sglang', 'openai' or 'selectkd'"),
        ({"url": "http://me:sk-1@host", "kind": "vllm"}, "api_key_env"),
        ({"url": "file:///etc/passwd", "kind": "vllm"}, "must be http"),
        ({"url": "http://host/?key=1", "kind": "vllm"}, "query"),
        ({"url": "http://host:99999", "kind": "vllm"}, "is no URL"),
        ({"kind": "vllm", "api_key": "sk-1"}, "Known here"),
        ({"kind": "vllm", "timeout": 0.0}, "above 0"),
    ],
)
def test_a_server_that_cannot_be_asked_is_a_fault_of_the_recipe(
    recipe: Made, pair: Path, change: dict[str, Any], told: str
) -> None:
    path = recipe({"model": str(pair / "teacher")})
    teacher = {"url": "http://127.0.0.1:9", **change}
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, [f"teacher={json.dumps(teacher)}"])
    assert told in str(caught.value) and "sk-1" not in str(caught.value)


def examined(url: str, pair: Path, capsys: Any, *more: str) -> tuple[int, dict[str, Any]]:
    code = main(
        ["teacher", "doctor", url, "--tokenizer", str(pair / "teacher"), "--k", "12", "--json", "-", *more]
    )
    return code, json.loads(capsys.readouterr().out or "null")


@pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
def test_the_doctor_finds_what_a_server_gives(pair: Path, model: Any, kind: str, capsys: Any) -> None:
    with on_a_port(Served(model, kind, limit=20)) as url:
        code, found = examined(url, pair, capsys)
    assert code == 0 and found["able"] and not found["wrong"]
    assert (found["kind"], found["model"], found["max_length"]) == (kind, "tiny", 64)
    assert found["most"] == (VOCABULARY if kind == "sglang" else 20)
    assert found["extra"] == (kind != "sglang") and not found["processed"]
    assert found["repeated"] == 0 and found["prefix"] < 1e-4
    assert ("gets token ids alone" in found["images"]) == (kind != "vllm")


def test_the_doctor_names_the_flags_that_are_missing(pair: Path, model: Any, capsys: Any) -> None:
    low = Served(model, "vllm", limit=9)
    low.scaled = True
    with on_a_port(low) as url:
        code, found = examined(url, pair, capsys)
    assert code == 4 and found["most"] == 9 and found["processed"]
    assert found["flags"] == ["--max-logprobs 12", "--logprobs-mode raw_logprobs"]
    stale = Served(model, "vllm")
    stale.stale = 0.6
    with on_a_port(stale) as url:
        code, found = examined(url, pair, capsys)
    assert code == 4 and found["flags"] == ["--no-enable-prefix-caching"]
    assert found["repeated"] == pytest.approx(0.6) and not found["processed"]


def test_the_doctor_names_the_flag_for_logits(pair: Path, model: Any, capsys: Any) -> None:
    served = Served(model, "vllm")
    served.logits = True
    with on_a_port(served) as url:
        assert main(["teacher", "doctor", url, "--tokenizer", str(pair / "teacher"), "--k", "12"]) == 4
    assert "--logprobs-mode raw_logprobs" in capsys.readouterr().err


def test_stale_answers_are_refused_before_a_run(recipe: Made, pair: Path, model: Any) -> None:
    served = Served(model, "vllm")
    served.stale = 0.6
    with (
        on_a_port(served) as url,
        pytest.raises(TeacherError, match=r"--no-enable-prefix-caching|No such answer was used"),
    ):
        train(load_recipe(recipe(at(url, pair, k=12)), []))
