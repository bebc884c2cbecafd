"""Keys that must not be shown, certificates that must be believed or not, and what errors call a setting."""

from __future__ import annotations

import gc
import json
import random
import socket
import ssl
import string
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import ConfigError, TeacherError
from selectkd.evals.judging.judges import EndpointJudge
from selectkd.models.load import load_model
from selectkd.teachers.remote.connection import Connection, Question
from selectkd.teachers.remote.secrets import key_of, without_key
from selectkd.teachers.remote.server import TopKServer
from selectkd.teachers.remote.settings import JUDGE, SPECULATE
from selectkd.teachers.server.run import token_of
from selectkd.training.run import train
from speculative.test_served import Speculating
from teachers.ours import own_server
from teachers.served import on_a_port
from training.tiny import VOCABULARY, tiny_llama, write_pair

KEY = "sk-secret-0123456789"
LONG = "sk-proj-" + "".join(random.Random(5).choices(string.ascii_letters + string.digits, k=120))
IDS = [5, 9, 33, 2]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=1))
    return root


def answering(answer: Callable[[httpx2.Request], httpx2.Response], **keys: Any) -> Connection:
    keys = {"wait": 0.0, "retries": 0, "timeout": 5.0, **keys}
    return Connection("http://teacher", transport=httpx2.MockTransport(answer), **keys)


def shown_of(key: str, text: str) -> int:
    """The most letters of the key in a row that a text shows."""
    best = 0
    for start in range(len(key)):
        while start + best < len(key) and key[start : start + best + 1] in text:
            best += 1
    return best


ECHOES = {
    "in a body that is no JSON": lambda key: (200, {}, f"<{key}>"),
    "across the place where a message is cut": lambda key: (400, {}, "x" * 1990 + key),
    "beside long words": lambda key: (403, {}, "Incorrect API key provided: " * 9 + key),
    "cut by the server": lambda key: (401, {}, f"bad key {key[:60]}..."),
    "in a header": lambda key: (200, {"content-encoding": key}, ""),
    "as JSON writes it": lambda key: (400, {}, json.dumps({"error": f"{key} is not known"}).replace("/", "\\/")),
    "as a model's name": lambda key: (200, {}, json.dumps({"data": [{"id": key}, {"id": f"{key}2"}]})),
    "in an away server's words": lambda key: (502, {}, "." * 90 + key),
    "as an id": lambda key: (200, {}, json.dumps({"choices": [{"prompt_logprobs": [None, {key: {}}, None, None]}]})),
}  # fmt: skip


@pytest.mark.parametrize(
    "key", [LONG, "/".join([LONG[:50], LONG[50:90], LONG[90:]])], ids=["long", "slashes"]
)
@pytest.mark.parametrize("how", sorted(ECHOES))
def test_a_long_key_that_a_server_echoes_is_not_shown_however_it_is_cut(
    how: str, key: str, caplog: Any
) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        status, headers, body = ECHOES[how](key)
        return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(body.encode()))

    server = TopKServer(answering(answer, key=key), "vllm", 4, VOCABULARY)
    with pytest.raises(TeacherError) as caught:
        server.served() if how == "as a model's name" else server.top_k([(IDS, [0])])
    server.connection.close()
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__  # type: ignore[assignment]
    assert shown_of(key, "\n".join(chain) + caplog.text) < 8, chain


def test_a_key_is_hidden_whole_and_other_words_stay() -> None:
    assert without_key(f"a {LONG} b {LONG[3:40]}, c", LONG) == "a [key] b [key], c"
    assert without_key("nothing of it", LONG) == "nothing of it" and without_key("abc", None) == "abc"
    assert without_key("pw and pw2", "pw") == "[key] and [key]2"


MISTAKES = ["sk-proj-4f1b9c2d7e", "hf_AbCdEfGhIjKlMnOpQr", "AKIAIOSFODNN7EXAMPLE", "0123456789abcdef0123456789abcdef",
            "ghp_16C7e42F292c6912E7710c838347Ae178B4a"]  # fmt: skip


@pytest.mark.parametrize("key", MISTAKES)
def test_a_key_written_in_the_place_of_a_variables_name_is_never_printed(
    key: str, pair: Path, tmp_path: Path, capsys: Any
) -> None:
    teacher = {"url": "http://127.0.0.1:9", "kind": "vllm", "tokenizer": str(pair / "teacher"), "k": 9}
    content = {
        "teacher": {**teacher, "api_key_env": key},
        "student": {"model": str(pair / "student")},
        "data": {"sources": [{"path": str(pair / "text.jsonl")}]},
        "training": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "batch_size": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    served = {"kind": "vllm", "url": "http://127.0.0.1:9", "model": "m", "folder": "f", "api_key_env": key}
    policy = json.dumps({"name": "student", "served": served})
    model = str(pair / "student")
    for command in (
        ["train", str(path)],
        ["doctor", str(path)],
        ["train", str(path), "--set", "teacher={model: " + model + "}", "--set", f"data.policy={policy}"],
        ["teacher", "doctor", "http://127.0.0.1:9", "--api-key-env", key],
        ["study", "speculate", "--target", model, "--server", "http://127.0.0.1:9", "--server-model", "m",
         "--api-key-env", key],
    ):  # fmt: skip
        assert main(command) == 2, command
        told = capsys.readouterr()
        assert key not in told.out + told.err and "not shown" in told.out + told.err, command
    with pytest.raises(ConfigError) as caught:
        token_of(key)
    assert key not in str(caught.value)


def test_a_variable_with_a_name_of_one_is_told_by_it(monkeypatch: Any) -> None:
    for name in ("TEACHER_KEY", "MY_2ND_KEY", "TOKEN", "OPENAI_API_KEY"):
        with pytest.raises(ConfigError, match=f"export {name}="):
            key_of(name, "teacher.api_key_env")
    monkeypatch.setenv("TEACHER_KEY", " abc ")
    assert key_of("TEACHER_KEY", "teacher.api_key_env") == "abc"


def refusing(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(503, headers={"retry-after": "99"}, stream=httpx2.ByteStream(b""))


@pytest.mark.parametrize("settings", [JUDGE, SPECULATE], ids=["judge", "speculate"])
@pytest.mark.parametrize("status", [401, 403, 404, 307, 503])
def test_errors_name_the_settings_of_the_one_who_asked(settings: Any, status: int) -> None:
    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(status, stream=httpx2.ByteStream(b""))

    judge = EndpointJudge(answering(answer, settings=settings), "m")
    with pytest.raises(TeacherError) as caught:
        judge.ask(["which?"], lambda index, reply: None)
    judge.connection.close()
    assert "teacher." not in str(caught.value)
    named = {401: settings.key, 403: settings.key, 404: settings.model, 307: settings.url}.get(status)
    assert named is None or named in str(caught.value)


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_an_address_is_meant_with_and_without_its_v1(end: str) -> None:
    asked: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(str(request.url))
        return httpx2.Response(200, stream=httpx2.ByteStream(b""))

    connection = Connection(f"http://host:8000{end}", transport=httpx2.MockTransport(answer))
    connection.ask([Question("/v1/completions", b"{}", 9, lambda reply: None)])
    connection.close()
    assert asked == ["http://host:8000/v1/completions"]


def test_speculate_asks_a_server_named_with_its_v1(pair: Path, capsys: Any) -> None:
    model = load_model(str(pair / "teacher")).model
    served = Speculating(model, model, "vllm")
    with on_a_port(served) as url:
        target = ["--target", str(pair / "teacher"), "--tokens", "4", "--temperature", "0"]
        assert main(["study", "speculate", *target, "--server", f"{url}/v1", "--server-model", "tiny"]) == 0
    capsys.readouterr()
    assert {path for path, _, _ in served.requests} == {"/v1/completions", "/metrics"}


def test_a_stalled_answer_is_asked_for_again_although_its_time_is_longer_than_the_wait(caplog: Any) -> None:
    stalled = [True]

    async def answer(request: httpx2.Request) -> httpx2.Response:
        if stalled.pop() if stalled else False:
            import asyncio

            await asyncio.sleep(30)
        return httpx2.Response(200, stream=httpx2.ByteStream(b"ok"))

    connection = Connection("http://teacher", timeout=0.6, wait=0.3, transport=httpx2.MockTransport(answer))
    started = time.monotonic()
    assert connection.ask([Question("/", None, 9, lambda reply: reply.body)]) == [b"ok"]
    assert time.monotonic() - started < 5
    connection.close()
    assert "not whole after 0.6 s" in caplog.text


def certificate(folder: Path, name: str) -> None:
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-subj", "/CN=own", "-addext", f"subjectAltName={name}", "-days", "2", "-keyout", "key.pem",
            "-out", "cert.pem"]  # fmt: skip
    try:
        subprocess.run(made, cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl makes the certificate")


def test_a_run_over_tls_believes_the_authority_that_is_named_and_no_other(
    pair: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    certificate(tmp_path, "IP:127.0.0.1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setenv("TEACHER_KEY", KEY)
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    pem = tmp_path / "cert.pem"

    def recipe(run: str, **keys: Any) -> Any:
        teacher = {"url": url, "kind": "selectkd", "api_key_env": "TEACHER_KEY", "wait": 5.0, **keys}
        content = {
            "teacher": teacher,
            "student": {"model": str(pair / "student")},
            "data": {"sources": [{"path": str(pair / "text.jsonl")}]},
            "training": {"output_dir": str(tmp_path / run), "max_steps": 1, "batch_size": 2, "max_length": 32,
                         "max_prompt_length": 16, "probe_samples": 0},
        }  # fmt: skip
        path = tmp_path / f"{run}.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        return load_recipe(path, [])

    with own_server(str(pair / "teacher"), token=KEY, certificate=pem, key=tmp_path / "key.pem") as http:
        url = http.replace("http:", "https:")
        assert train(recipe("named", ca=str(pem))).steps == 1
        assert main(["teacher", "doctor", url, "--api-key-env", "TEACHER_KEY", "--ca", str(pem)]) == 0
        with pytest.raises(TeacherError, match=r"certificate that cannot be verified.*teacher\.ca"):
            train(recipe("unnamed", wait=0.2))
        monkeypatch.setenv("SSL_CERT_FILE", str(pem))
        assert train(recipe("environment")).steps == 1
    for broken, told in ((tmp_path / "none.pem", "is not there"), (pair / "text.jsonl", "no certificate")):
        with pytest.raises(ConfigError, match=rf"teacher\.ca = .* {told}"):
            train(recipe("broken", ca=str(broken)))
    url = "http://127.0.0.1:9"
    with pytest.raises(ConfigError, match="goes with https"):
        recipe("plain", ca=str(pem))
    capsys.readouterr()
    gc.collect()  # a socket that the server left open is an error


@contextmanager
def asking(url: str, **keys: Any) -> Iterator[TopKServer]:
    connection = Connection(url, **{"retries": 0, "timeout": 5.0, **keys})
    try:
        yield TopKServer(connection, "vllm", 4, VOCABULARY, "tiny")
    finally:
        connection.close()


def test_a_server_with_another_ones_certificate_is_sent_nothing(tmp_path: Path) -> None:
    certificate(tmp_path, "DNS:elsewhere.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    read: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        one, _ = listener.accept()
        try:
            with context.wrap_socket(one, server_side=True) as inside:
                read.append(inside.recv(65536))
        except (ssl.SSLError, OSError):
            one.close()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    url = f"https://127.0.0.1:{listener.getsockname()[1]}"
    refused = pytest.raises(TeacherError, match="certificate that cannot be verified")
    with asking(url, key=KEY, wait=30.0) as server, refused:
        server.top_k([(IDS, [0])])
    thread.join(5)
    listener.close()
    assert not any(read)
