"""A server that writes for the student: with fresh weights the run is that of a student in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from selectkd.errors import TeacherError
from selectkd.rollouts.generate import Request, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.training.run import train
from training.tiny import VOCABULARY

Server = Callable[..., tuple[str, list[str]]]


@pytest.fixture
def server() -> Iterator[Server]:
    """server(folder, refuses=False): a server in the manner of both kinds, and the paths it is asked for, in order.
    It has no model before its first refresh.
    """
    running: list[ThreadingHTTPServer] = []

    def made(folder: Path, *, refuses: bool = False) -> tuple[str, list[str]]:
        holds: list[Any] = []
        asked: list[str] = []

        def answer(path: str, body: dict[str, Any]) -> dict[str, Any]:
            asked.append(path)
            if path == "/update_weights_from_disk" and not refuses:
                holds[:] = [AutoModelForCausalLM.from_pretrained(body["model_path"]).eval()]
                return {"success": True, "message": "Succeeded"}
            if path == "/update_weights_from_disk":
                return {"success": False, "message": "no room"}
            if path == "/collective_rpc":
                assert body == {"method": "reload_weights"}
                holds[:] = [AutoModelForCausalLM.from_pretrained(folder).eval()]
                return {"results": [None]}
            if path == "/reset_prefix_cache":
                return {}
            rule = Draw(Sampling(body["temperature"], body["top_p"]))
            request = Request(body["prompt"], body["max_tokens"])
            (text,) = generate(holds, [request], rule, ends={2}, width=VOCABULARY)
            reason = "stop" if text.ended else "length"
            return {"choices": [{"text": "", "finish_reason": reason, "token_ids": text.ids}]}

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                said = json.dumps(answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None: ...

        one = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=one.serve_forever, daemon=True).start()
        running.append(one)
        return f"http://127.0.0.1:{one.server_port}", asked

    yield made
    for one in running:
        one.shutdown()
        one.server_close()


def lines(run: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (run / "metrics.jsonl").read_text("utf-8").splitlines())
    return [line for line in found if "written" in line]


def greedy(served: dict[str, Any] | None) -> dict[str, Any]:
    policy = {"name": "student", "probability": 1.0, "temperature": 0.0, "served": served}
    return {"max_new_tokens": 5, "policy": policy}


@pytest.mark.parametrize("kind", ["sglang", "vllm"])
def test_a_served_student_with_fresh_weights_trains_as_one_in_memory(
    kind: str, recipe: Callable[..., Any], tmp_path: Path, server: Server
) -> None:
    training = {"max_steps": 3, "evaluate_every": None, "lora": {"r": 2, "alpha": 4, "dropout": 0.0}}
    folder = tmp_path / "served"
    url, asked = server(folder)
    served = {"url": url, "kind": kind, "model": "tiny", "folder": str(folder)}
    for name, said in (("memory", None), ("server", served)):
        train(
            recipe(method="kd", data=greedy(said), training={**training, "output_dir": str(tmp_path / name)})
        )
    ours, theirs = lines(tmp_path / "server"), lines(tmp_path / "memory")
    assert len(ours) == 3
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)  # merged adapters round otherwise
        assert one["tokens"] == other["tokens"] and one["written"]["staleness"] == 0
    refresh = (
        ["/update_weights_from_disk"] if kind == "sglang" else ["/collective_rpc", "/reset_prefix_cache"]
    )
    assert asked == [*refresh, *["/v1/completions"] * 3] * 3


def test_a_student_that_is_refreshed_every_second_step_is_up_to_one_step_stale(
    recipe: Callable[..., Any], tmp_path: Path, server: Server
) -> None:
    url, asked = server(tmp_path / "served")
    served = {
        "url": url,
        "kind": "sglang",
        "model": "tiny",
        "folder": str(tmp_path / "served"),
        "refresh_every": 2,
    }
    train(recipe(method="kd", data=greedy(served), training={"max_steps": 4, "evaluate_every": None}))
    assert [line["written"]["staleness"] for line in lines(tmp_path / "run")] == [0, 1, 0, 1]
    assert asked.count("/update_weights_from_disk") == 2


def test_a_server_that_does_not_take_the_weights_ends_the_run(
    recipe: Callable[..., Any], tmp_path: Path, server: Server
) -> None:
    url, _ = server(tmp_path / "served", refuses=True)
    served = {"url": url, "kind": "sglang", "model": "tiny", "folder": str(tmp_path / "served")}
    with pytest.raises(TeacherError, match="no room"):
        train(recipe(method="kd", data=greedy(served)))
