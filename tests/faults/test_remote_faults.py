"""Servers that are away, busy, slow, endless or false (FAULTS T1 to T5): what the client does, and for how long."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import TeacherError
from selectkd.models.load import load_model
from selectkd.teachers.remote.connection import Connection, Question, Reply
from selectkd.teachers.remote.server import TopKServer
from selectkd.training.checks import prepare
from selectkd.training.run import train
from teachers.ours import own_server
from teachers.served import Answer, Served, on_a_port
from training.tiny import VOCABULARY, tiny_llama, write_pair

OUTAGE = float(os.environ.get("SELECTKD_TEST_OUTAGE", "1.0"))
"""Seconds the server is away in the middle of a run; the promise is made for 20."""

KEY = "sk-secret-0123456789"
IDS = [5, 9, 33, 2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=3, hidden=48))
    return root


@pytest.fixture(scope="module")
def model(pair: Path) -> Any:
    return load_model(str(pair / "teacher")).model


@pytest.fixture
def recipe(pair: Path, tmp_path: Path, monkeypatch: Any) -> Callable[..., str]:
    """The path of a recipe with the teacher at a URL: recipe(url, run="name", wait=5.0)."""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))

    def made(url: str, run: str = "run", **keys: Any) -> str:
        content = {
            "teacher": {"url": url, "kind": "vllm", "tokenizer": str(pair / "teacher"), "k": 12, **keys},
            "student": {"model": str(pair / "student")},
            "data": {"sources": [{"path": str(pair / "text.jsonl")}]},
            "objective": {"verifier": {"name": "greedy_topk", "k": 5}, "beta": 0.1},
            "training": {"output_dir": str(tmp_path / run), "max_steps": 12, "batch_size": 3, "learning_rate": 1e-2,
                         "max_length": 32, "max_prompt_length": 16, "probe_samples": 0},
        }  # fmt: skip
        path = tmp_path / f"{run}.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        return str(path)

    return made


def weights(path: str) -> bytes:
    return (train(load_recipe(path, [])).run_dir / "student" / "model.safetensors").read_bytes()


def steps_in(run: Path) -> int:
    """How many steps a run has written lines of."""
    path = run / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return sum("loss" in json.loads(line) for line in lines)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@contextmanager
def asking(url: str, **keys: Any) -> Iterator[TopKServer]:
    keys = {"retries": 0, "wait": 0.0, "timeout": 5.0, **keys}
    connection = Connection(url, **keys)
    try:
        yield TopKServer(connection, "vllm", 4, VOCABULARY, "tiny")
    finally:
        connection.close()


def test_a_server_that_is_down_at_the_start_is_waited_for_and_then_told(
    recipe: Callable[..., str], capsys: Any, tmp_path: Path
) -> None:
    started = time.monotonic()
    url = f"http://127.0.0.1:{free_port()}"
    assert main(["train", recipe(url, wait=0.4)]) == TeacherError.exit_code
    assert 0.3 < time.monotonic() - started < 10
    told = capsys.readouterr().err
    assert url in told and "teacher.wait, now 0.4 s" in told and "Traceback" not in told
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not (tmp_path / "run").exists()
    with pytest.raises(TeacherError):  # by the part of the assembly that needs no weights
        prepare(load_recipe(recipe(url, wait=0.1), []))


def test_a_server_that_starts_late_is_waited_for(model: Any) -> None:
    port = free_port()
    with asking(f"http://127.0.0.1:{port}", wait=20.0) as server:
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.extend(server.top_k([(IDS, [0, 1])])))
        thread.start()
        time.sleep(0.3)
        with on_a_port(Served(model, "vllm"), port):
            thread.join(20)
        assert found[0].ids.shape == (2, 4)


@pytest.mark.parametrize("kind", ["vllm", "selectkd"])
def test_a_server_that_dies_in_the_middle_and_comes_back_leaves_identical_weights(
    recipe: Callable[..., str], pair: Path, model: Any, tmp_path: Path, kind: str, caplog: Any
) -> None:
    def serving(port: int) -> Any:
        if kind == "selectkd":
            return own_server(str(pair / "teacher"), port=port)
        return on_a_port(Served(model, kind), port)

    keys = {"kind": kind, "k": None, "tokenizer": None} if kind == "selectkd" else {}
    with serving(0) as url:
        expected = weights(recipe(url, run="whole", **keys))
    port, result = free_port(), []
    path = recipe(f"http://127.0.0.1:{port}", run="torn", wait=OUTAGE + 60, **keys)
    run = threading.Thread(target=lambda: result.append(weights(path)))
    metrics = tmp_path / "torn" / "metrics.jsonl"
    with caplog.at_level(logging.WARNING, "selectkd"):
        with serving(port):
            run.start()
            until = time.monotonic() + 60
            while not metrics.is_file() or metrics.read_text().count("\n") < 3:
                assert time.monotonic() < until
                time.sleep(0.002)
        time.sleep(OUTAGE)
        assert not result, "it was still at work"
        with serving(port):
            run.join(120)
    assert result == [expected]
    assert "does not answer" in caplog.text


def test_a_server_that_never_comes_back_ends_the_run_with_4(
    recipe: Callable[..., str], model: Any, capsys: Any, tmp_path: Path
) -> None:
    served = Served(model, "vllm")
    served.fault = lambda path, answer: answer if steps_in(tmp_path / "run") < 2 else (502, {}, b"gone")
    with on_a_port(served) as url:
        assert main(["train", recipe(url, wait=0.2)]) == 4
    assert "502" in capsys.readouterr().err
    assert steps_in(tmp_path / "run") == 2


BAD: dict[str, Callable[[Answer], Answer]] = {
    "HTML": lambda answer: (200, {}, b"<html>busy</html>"),
    "cut JSON": lambda answer: (200, {}, answer[2][:-40]),
    "no choices": lambda answer: (200, {}, b'{"choices": []}'),
    "a positive log-prob": lambda answer: (
        200,
        {},
        answer[2].replace(b'"logprob": -', b'"logprob": 0.5e-0, "x": -'),
    ),
    "null log-probs": lambda answer: (
        200,
        {},
        answer[2].replace(b'"logprob": -', b'"logprob": null, "x": -'),
    ),
    "fewer positions": lambda answer: (200, {}, answer[2].replace(b"[null, {", b"[{")),
}


@pytest.mark.parametrize("how", sorted(BAD))
def test_bad_answers_end_a_run_with_4_and_no_step_is_taken_on_them(
    recipe: Callable[..., str], model: Any, capsys: Any, tmp_path: Path, how: str
) -> None:
    served = Served(model, "vllm")
    served.fault = lambda path, answer: answer if steps_in(tmp_path / "run") < 2 else BAD[how](answer)
    with on_a_port(served) as url:
        assert main(["train", recipe(url, retries=1)]) == 4
    assert "wrong 2 times" in capsys.readouterr().err
    assert steps_in(tmp_path / "run") == 2


def test_bad_answers_in_between_change_no_weight(recipe: Callable[..., str], model: Any) -> None:
    with on_a_port(Served(model, "vllm")) as url:
        expected = weights(recipe(url, run="whole"))
    served = Served(model, "vllm")
    bad = list(BAD.values())
    served.fault = lambda path, answer: (
        bad[len(served.requests) // 5 % len(bad)](answer) if len(served.requests) % 5 == 0 else answer
    )
    with on_a_port(served) as url:
        assert weights(recipe(url, run="mixed", concurrency=1)) == expected


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("as_date", [False, True])
def test_a_busy_server_is_asked_again_when_it_says(model: Any, status: int, as_date: bool) -> None:
    times: list[float] = []
    served = Served(model, "vllm")

    def busy(path: str, answer: Answer) -> Answer:
        times.append(time.time())
        when = formatdate(times[0] + 2, usegmt=True) if as_date else "1"
        return answer if len(times) > 1 else (status, {"retry-after": when}, b"later")

    served.fault = busy
    with on_a_port(served) as url, asking(url, wait=30.0) as server:
        server.top_k([(IDS, [0])])
    assert 0.95 < times[1] - times[0] < 5


def test_a_server_that_is_busy_for_longer_than_is_waited_is_told_at_once(model: Any) -> None:
    served = Served(model, "vllm", fault=lambda path, answer: (429, {"retry-after": "3600"}, b""))
    with on_a_port(served) as url, asking(url, wait=30.0) as server:
        started = time.monotonic()
        with pytest.raises(TeacherError, match="come back in 3600 s"):
            server.top_k([(IDS, [0])])
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (401, f"Incorrect API key provided: {KEY}", "teacher.api_key_env"),
        (403, KEY, "teacher.api_key_env"),
        (404, f"no model, key {KEY}", "teacher.model"),
        (400, f"bad \x1b[31m request {KEY}", r"refused the request \(status 400\)"),
        (413, "too long", "status 413"),
        (307, "", "redirects to another address"),
        (200, f"<{KEY}>", "no JSON"),
        (500, KEY, "status 500"),
    ],
)
def test_a_refusal_is_told_at_once_and_never_with_the_key(
    model: Any, status: int, body: str, told: str, caplog: Any
) -> None:
    served = Served(
        model, "vllm", fault=lambda path, answer: (status, {"location": "http://x/"}, body.encode())
    )
    with on_a_port(served) as url, asking(url, key=KEY, wait=0.0) as server:
        started = time.monotonic()
        with pytest.raises(TeacherError, match=told) as caught:
            server.top_k([(IDS, [0])])
        assert time.monotonic() - started < 5
    assert len(served.requests) == 1 and served.requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value) and KEY not in caplog.text and "\x1b" not in str(caught.value)
    assert KEY not in repr(server.connection)


def test_after_a_refusal_nothing_new_is_asked_and_what_is_under_way_is_kept() -> None:
    asked: list[str] = []
    kept: list[Reply] = []

    async def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request.url.path)
        refused = request.url.path == "/0"
        await asyncio.sleep(0.02 if refused else 0.2)
        return httpx2.Response(400 if refused else 200, stream=httpx2.ByteStream(b""))

    connection = Connection("http://teacher", transport=httpx2.MockTransport(answer), concurrency=3)
    with pytest.raises(TeacherError, match="/0 refused the request"):
        connection.ask([Question(f"/{i}", None, 100, kept.append) for i in range(9)])
    connection.close()
    assert asked == ["/0", "/1", "/2"] and len(kept) == 2


def test_a_limit_on_log_probs_names_the_flag(recipe: Callable[..., str], model: Any, capsys: Any) -> None:
    with on_a_port(Served(model, "vllm", limit=10)) as url:
        assert main(["train", recipe(url)]) == 4
    told = capsys.readouterr().err
    assert "--max-logprobs 12" in told and "teacher.k to 10" in told


def test_a_key_that_is_not_there_is_told_by_its_name(recipe: Callable[..., str], capsys: Any) -> None:
    assert main(["train", recipe("http://127.0.0.1:9", api_key_env="SELECTKD_NO_SUCH_KEY")]) == 2
    assert "export SELECTKD_NO_SUCH_KEY=" in capsys.readouterr().err


@contextmanager
def raw_server(speak: Callable[[socket.socket, threading.Event], None]) -> Iterator[str]:
    """A server that says whatever ``speak`` writes after one request; the event is set when it should stop."""
    done, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                one, _ = listener.accept()
            except OSError:
                return
            with one:
                try:
                    one.recv(65536)
                    speak(one, done)
                except OSError:
                    continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        done.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


OK = b"HTTP/1.1 200 OK\r\n"


def drip(one: socket.socket, done: threading.Event, content: bytes) -> None:
    for byte in content:
        if done.wait(0.1):
            return
        one.sendall(bytes([byte]))


SLOW: dict[str, Callable[[socket.socket, threading.Event], Any]] = {
    "no answer": lambda one, done: done.wait(30),
    "a stall in the headers": lambda one, done: (one.sendall(OK + b"content-le"), done.wait(30)),
    "a stall in the body": lambda one, done: (
        one.sendall(OK + b"content-length: 99\r\n\r\n{"),
        done.wait(30),
    ),
    "dripping headers": lambda one, done: drip(one, done, OK + b"x-y: " + b"z" * 1000),
    "a dripping body": lambda one, done: (
        one.sendall(OK + b"content-length: 999\r\n\r\n"),
        drip(one, done, b" " * 999),
    ),
}


@pytest.mark.parametrize("how", sorted(SLOW))
def test_an_answer_has_its_time_in_all_wherever_it_hangs(how: str) -> None:
    with raw_server(SLOW[how]) as url, asking(url, timeout=0.5) as server:
        started = time.monotonic()
        with pytest.raises(TeacherError, match=r"not whole after 0\.5 s"):
            server.top_k([(IDS, [0])])
        assert time.monotonic() - started < 0.5 + 5


def endless(one: socket.socket, done: threading.Event) -> None:
    one.sendall(OK + b"transfer-encoding: chunked\r\n\r\n")
    block = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    while not done.is_set():
        one.sendall(block)


LARGE: dict[str, Callable[[socket.socket, threading.Event], Any]] = {
    "5 GB that are announced": lambda one, done: (
        one.sendall(OK + b"content-length: 5000000000\r\n\r\n{"),
        done.wait(30),
    ),
    "5 GB that are not": endless,
    "a gzip bomb": lambda one, done: one.sendall(
        OK + b"content-encoding: gzip\r\ncontent-length: 1044\r\n\r\n" + gzip.compress(b" " * 10**6)[:1044]
    ),
}


@pytest.mark.parametrize("how", sorted(LARGE))
def test_no_more_is_read_than_an_answer_can_have(how: str) -> None:
    refused = pytest.raises(TeacherError, match=r"body (of|in)")
    with raw_server(LARGE[how]) as url, asking(url, timeout=20.0) as server, refused:
        server.top_k([(IDS, [0])])


def test_a_redirect_is_not_followed_and_the_key_stays(model: Any) -> None:
    other = Served(model, "vllm")
    with on_a_port(other) as elsewhere:
        served = Served(model, "vllm", fault=lambda path, answer: (302, {"location": elsewhere + path}, b""))
        refused = pytest.raises(TeacherError, match="not followed")
        with on_a_port(served) as url, asking(url, key=KEY) as server, refused:
            server.top_k([(IDS, [0])])
    assert not other.requests
