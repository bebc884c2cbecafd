"""A cache that a server fills holds what a cache of the model holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from selectkd.cli import main
from selectkd.models.load import load_model
from selectkd.teachers.cache import open_cache
from teachers.ours import own_server
from teachers.served import Served, on_a_port
from teachers.test_cached_runs import losses
from training.tiny import VOCABULARY

Made = Callable[..., str]


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))


def shards(folder: Path) -> list[bytes]:
    cache = open_cache(folder)
    return [cache.shard(i).rows(np.arange(cache.shard(i).count)).tobytes() for i in range(len(cache.entries))]


@pytest.mark.parametrize("payload", [{}, {"payload": "top_k", "k": 12}, {"payload": "sampled", "k": 12}])
def test_our_own_server_fills_any_cache(
    recipe: Made, pair: Path, tmp_path: Path, payload: dict[str, Any]
) -> None:
    model = str(pair / "teacher")
    objective = {"verifier": "always", "beta": 1.0}
    live = recipe({"cache": str(tmp_path / "live"), "model": model, **payload}, objective, run="live")
    assert main(["cache", "build", live]) == 0
    with own_server(model) as url:
        server = {"url": url, "kind": "selectkd"}
        path = recipe({"cache": str(tmp_path / "far"), "server": server, **payload}, objective, run="far")
        assert main(["cache", "build", path]) == 0
    assert main(["cache", "verify", str(tmp_path / "far")]) == 0
    ours, theirs = open_cache(tmp_path / "far"), open_cache(tmp_path / "live")
    assert ours.index["teacher"]["weights"] == theirs.index["teacher"]["weights"]
    if not payload:
        one, other = (torch.frombuffer(bytearray(b"".join(shards(r.folder))), dtype=torch.bfloat16)
                      for r in (ours, theirs))  # fmt: skip
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-4)
    else:
        same = [
            a == b
            for a, b in zip(b"".join(shards(ours.folder)), b"".join(shards(theirs.folder)), strict=True)
        ]
        assert sum(same) > 0.9 * len(same), "the last digit of a log-probability may be another"


def test_a_run_from_a_cache_that_vllm_filled_has_the_losses_of_a_live_teacher(
    recipe: Made, pair: Path, tmp_path: Path, capsys: Any
) -> None:
    model = load_model(str(pair / "teacher")).model
    live = losses(recipe({"model": str(pair / "teacher")}, run="live"))
    folder = tmp_path / "cache"
    with on_a_port(Served(model, "vllm")) as url:
        server = {"url": url, "kind": "vllm", "tokenizer": str(pair / "teacher"), "k": VOCABULARY}
        path = recipe({"cache": str(folder), "server": server, "precision": "float32", "shard_rows": 40})
        assert main(["cache", "build", path]) == 0
        whole = shards(folder)
        [first, *_] = sorted((folder / "shards").iterdir())
        first.unlink()
        capsys.readouterr()
        assert main(["cache", "repair", str(folder)]) == 5
        assert "selectkd cache repair RECIPE" in capsys.readouterr().err
        assert main(["cache", "repair", path]) == 0
        assert shards(folder) == whole
    capsys.readouterr()  # the repair reports its shards
    assert main(["cache", "info", str(folder), "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["engine"]["server"] == "vllm" and told["teacher"]["model"] == "tiny"
    assert url not in json.dumps(told)
    torch.testing.assert_close(losses(recipe({"cache": str(folder)}, run="cached")), live, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("teacher", "told"),
    [
        ({}, "neither is given"),
        ({"model": "x", "server": {"url": "http://127.0.0.1:9", "kind": "selectkd"}}, "both are given"),
        (
            {
                "payload": "hidden",
                "server": {"url": "http://127.0.0.1:9", "kind": "vllm", "tokenizer": "x", "k": 9},
            },
            "gives its 9 best tokens",
        ),
    ],
)
def test_a_cache_without_an_origin_that_can_fill_it_is_not_begun(
    recipe: Made, tmp_path: Path, teacher: dict[str, Any], told: str, capsys: Any
) -> None:
    assert main(["cache", "build", recipe({"cache": str(tmp_path / "cache"), **teacher})]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
