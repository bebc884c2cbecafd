"""A server that changes its model is found out: mid-run, at a restart, before a resume, while a cache is built."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.test_remote_faults import free_port, steps_in
from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import ConfigError, TeacherError
from selectkd.models.load import load_model
from selectkd.teachers.cache import open_cache
from selectkd.training.run import train
from selectkd.training.run_folder import read_run
from teachers.ours import own_server
from teachers.served import Answer, Served, on_a_port
from teachers.test_cached_runs import losses
from training.tiny import tiny_llama, tiny_tokenizer

Made = Callable[..., str]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))


@pytest.fixture(scope="session")
def model(pair: Path) -> Any:
    return load_model(str(pair / "teacher")).model


@pytest.fixture(scope="session")
def tuned(model: Any) -> Any:
    """The model a little further: every weight moved by a hundredth of what it is."""
    other = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(7)
        for weight in other.parameters():
            weight.mul_(1 + 0.01 * torch.randn_like(weight))
    return other


def at(url: str, pair: Path, kind: str = "vllm", **keys: Any) -> dict[str, Any]:
    k = {} if kind == "selectkd" else {"k": 12, "tokenizer": str(pair / "teacher")}
    return {"url": url, "kind": kind, **k, **keys}


def exchanged(served: Served, run: Path, other: Any) -> Callable[[str, Answer], Answer]:
    """A fault that puts another model into the server once the run has taken two steps; no connection ends."""

    def fault(path: str, answer: Answer) -> Answer:
        if steps_in(run) >= 2:
            served.model = other
        return answer

    return fault


@pytest.mark.parametrize("kind", ["vllm", "sglang", "openai"])
def test_a_model_exchanged_in_the_middle_ends_the_run_with_4(
    recipe: Made, pair: Path, model: Any, tuned: Any, tmp_path: Path, kind: str, capsys: Any
) -> None:
    served = Served(model, kind)
    served.fault = exchanged(served, tmp_path / "run", tuned)
    with on_a_port(served) as url:
        path = recipe(at(url, pair, kind, retries=1))
        assert main(["train", path]) == 4
        assert "another model than before" in capsys.readouterr().err
        taken = steps_in(tmp_path / "run")
        assert 2 <= taken <= 3  # what was under way when the third step was asked for
        served.fault = None  # the server keeps the other model
        assert main(["doctor", path]) == 4 and main(["train", path]) == 4
        assert "another model than this run" in capsys.readouterr().err
        assert steps_in(tmp_path / "run") <= taken
        served.model = model
        assert main(["train", path]) == 0


def test_values_that_go_stale_later_end_the_run_with_4(
    recipe: Made, pair: Path, model: Any, tmp_path: Path, capsys: Any
) -> None:
    served = Served(model, "vllm")

    def fault(path: str, answer: Answer) -> Answer:
        served.stale = 0.03 if steps_in(tmp_path / "run") >= 2 else 0.0
        return answer

    served.fault = fault
    with on_a_port(served) as url:
        assert main(["train", recipe(at(url, pair, retries=1))]) == 4
    assert "another model than before" in capsys.readouterr().err and steps_in(tmp_path / "run") <= 3


def test_a_server_restarted_with_another_model_is_found_out_although_the_next_look_is_far(
    recipe: Made, pair: Path, model: Any, tuned: Any, tmp_path: Path, capsys: Any
) -> None:
    port = free_port()
    first = on_a_port(Served(model, "vllm"), port)
    begun: list[Any] = []

    class Restarts:
        def stage(self, name: str, total: int | None = None) -> None: ...

        def line(self, line: dict[str, Any]) -> None:
            if "loss" in line and line["step"] == 2 and not begun:
                first.__exit__(None, None, None)
                begun.append(on_a_port(Served(tuned, "vllm"), port))
                begun[0].__enter__()

    path = recipe(at(f"http://127.0.0.1:{port}", pair, check_every=1000, retries=0))
    first.__enter__()
    try:
        with pytest.raises(TeacherError, match="another model than before"):
            train(load_recipe(path, []), progress=Restarts())
    finally:
        begun[0].__exit__(None, None, None)
    assert steps_in(tmp_path / "run") <= 3


def test_our_own_server_with_other_weights_is_refused_by_the_same_command_too(
    recipe: Made, pair: Path, tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other"
    tiny_llama(9, layers=3, hidden=48).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    port = free_port()
    path = recipe(at(f"http://127.0.0.1:{port}", pair, "selectkd"))
    with own_server(str(pair / "teacher"), port=port), pytest.raises(KeyboardInterrupt):

        class Stops:
            def stage(self, name: str, total: int | None = None) -> None: ...

            def line(self, line: dict[str, Any]) -> None:
                if line["step"] == 2:
                    raise KeyboardInterrupt

        train(load_recipe(path, ["training.save_every=1"]), progress=Stops())
    with own_server(str(other), port=port):
        assert main(["train", path, "--set", "training.save_every=1"]) == 4
        told = capsys.readouterr().err
        assert "another model than this run" in told and "checksum" in told
        with pytest.raises(ConfigError, match="no such key"):
            train(load_recipe(path, ["training.save_every=1"]), allow_change=["teacher_wieghts"])
        allowed = ["--allow-change", "teacher_weights"]
        assert main(["train", path, "--set", "training.save_every=1", *allowed]) == 0


def test_a_run_notes_the_exact_rows_and_stays_what_it_was_without_the_looks(
    recipe: Made, pair: Path, model: Any, tmp_path: Path
) -> None:
    served = Served(model, "vllm")
    with on_a_port(served) as url:
        often = losses(recipe(at(url, pair), run="often"))
        asked = len(served.requests)
        seldom = losses(recipe(at(url, pair, check_every=1000), run="seldom"))
        assert len(served.requests) - asked < asked
    torch.testing.assert_close(often, seldom, rtol=0, atol=0)
    noted = read_run(tmp_path / "often")["teacher_weights"]
    assert noted["noise"] < 1e-4 and 1 <= len(noted["prompts"]) <= 2
    for prompt, ids, logp in zip(noted["prompts"], noted["ids"], noted["logp"], strict=True):
        assert len(prompt) <= 24
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1], -1).topk(8)
        assert ids == rows.indices.tolist()
        torch.testing.assert_close(torch.tensor(logp), rows.values, rtol=0, atol=1e-5)


def test_rounding_under_load_is_no_other_model(recipe: Made, pair: Path, model: Any) -> None:
    served = Served(model, "vllm")
    plain, dice = served.logp, torch.Generator().manual_seed(0)

    def rounded(ids: list[int], temperature: float) -> Any:
        logp = plain(ids, temperature)
        return torch.log_softmax(logp + 0.01 * torch.randn(logp.shape, generator=dice), -1)

    served.logp = rounded  # type: ignore[method-assign]
    with on_a_port(served) as url:
        assert train(load_recipe(recipe(at(url, pair)), [])).steps == 6


@pytest.mark.parametrize("kind", ["vllm", "selectkd"])
def test_a_cache_is_not_finished_or_repaired_by_another_model(
    recipe: Made, pair: Path, model: Any, tuned: Any, tmp_path: Path, kind: str, capsys: Any
) -> None:
    folder, port = tmp_path / "cache", free_port()
    url = f"http://127.0.0.1:{port}"
    other = tmp_path / "other"
    tuned.save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)

    def serving(which: Any) -> Any:
        where = str(pair / "teacher" if which is model else other)
        return own_server(where, port=port) if kind == "selectkd" else on_a_port(Served(which, kind), port)

    path = recipe({"cache": str(folder), "server": at(url, pair, kind, k=12, wait=20.0), "shard_rows": 40})
    with serving(model):
        assert main(["cache", "build", path]) == 0
    noted = open_cache(folder).index["teacher"]["fingerprint"]
    assert noted["prompts"] and (noted["weights"] is not None) == (kind == "selectkd")
    whole = {one.name: one.read_bytes() for one in (folder / "shards").iterdir()}
    gone = sorted((folder / "shards").iterdir())[1]
    gone.unlink()
    (folder / "index.json").unlink()
    with serving(tuned):
        for verb in ("build", "repair"):
            capsys.readouterr()
            assert main(["cache", verb, path]) == 4, verb
            assert "another model than" in capsys.readouterr().err
        assert not gone.exists()
    with serving(model):
        assert main(["cache", "build", path]) == 0
    assert {one.name: one.read_bytes() for one in (folder / "shards").iterdir()} == whole


def test_a_model_exchanged_while_a_cache_is_built_leaves_no_shard_of_both(
    recipe: Made, pair: Path, model: Any, tuned: Any, tmp_path: Path, capsys: Any
) -> None:
    folder, served = tmp_path / "cache", Served(model, "vllm")

    def fault(path: str, answer: Answer) -> Answer:
        if len(list(folder.glob("shards/*.shard"))) >= 1:
            served.model = tuned
        return answer

    served.fault = fault
    with on_a_port(served) as url:
        path = recipe({"cache": str(folder), "server": at(url, pair, retries=1), "shard_rows": 40})
        assert main(["cache", "build", path]) == 4
    assert "another model than before" in capsys.readouterr().err
    assert len(list(folder.glob("shards/*.shard"))) <= 2 and not (folder / "index.json").exists()
    assert json.loads((folder / "plan.json").read_text())["teacher"]["fingerprint"]["prompts"]
