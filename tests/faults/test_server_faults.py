"""Our own server among strangers (FAULTS S1 to S3): who is let in, what is refused, who else is still served."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from selectkd.cli import main
from selectkd.errors import ConfigError
from selectkd.teachers.remote.connection import Connection
from selectkd.teachers.remote.own import OwnServer
from selectkd.teachers.remote.wire import question_bytes
from selectkd.teachers.server.limits import Limits
from teachers.ours import own_server
from training.tiny import VOCABULARY, tiny_llama, write_pair

TOKEN = "t0ken-of-the-test-0123456789"
JSON = {"content-type": "application/json"}
GOOD = question_bytes([5, 9, 33, 2], [0, 1], 4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1))
    return root


@pytest.fixture(scope="module")
def served(pair: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`selectkd serve-teacher` as a process of its own: its address, and the process."""
    command = [sys.executable, "-m", "selectkd", "serve-teacher", str(pair / "teacher"), "--port", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    assert "is served at http://127.0.0.1:" in line, process.stderr.read()
    try:
        yield line.split("is served at ")[1].split(". In a recipe")[0], process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.fixture(scope="module")
def guarded(pair: Path) -> Iterator[str]:
    with own_server(str(pair / "teacher"), token=TOKEN) as url:
        yield url


def resident(process: subprocess.Popen[str]) -> int:
    """Bytes the process has in memory."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


class Answer(NamedTuple):
    """What came back, header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


def request(
    url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> Answer:
    one = http.client.HTTPConnection(*address(url), timeout=30)
    try:
        one.request(method, path, body, headers or {})
        answer = one.getresponse()
        told = {name.lower(): value for name, value in answer.getheaders()}
        return Answer(answer.status, told, answer.read())
    finally:
        one.close()


def asked(url: str, body: bytes = GOOD, **headers: str) -> Answer:
    return request(url, "POST", "/rows", body, {**JSON, **headers})


def address(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rpartition(":")
    return host, int(port)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--host", "0.0.0.0"], "--api-key-env NAME and --certificate and --key are missing"),
        (["--host", "::", "--api-key-env", "SELECTKD_TEST_TOKEN"], "--certificate and --key are missing"),
        (["--host", "192.0.2.7"], "needs a token and TLS"),
        (["--host", "example.com"], "is not an address"),
        (["--api-key-env", "SELECTKD_TEST_SHORT"], "16 printable characters"),
        (["--api-key-env", "SELECTKD_TEST_NOT_SET"], "16 printable characters"),
        (["--certificate", "no.pem"], "go together"),
        (["--certificate", "no.pem", "--key", "no.pem"], "is not there"),
    ],
)
def test_a_server_that_others_could_reach_unguarded_does_not_start(
    flags: list[str], told: str, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.setenv("SELECTKD_TEST_TOKEN", TOKEN)
    monkeypatch.setenv("SELECTKD_TEST_SHORT", "short")
    assert main(["serve-teacher", "no/such/model", "--port", "0", *flags]) == ConfigError.exit_code
    said = capsys.readouterr().err
    assert told in said and TOKEN not in said


def test_a_port_that_is_taken_is_told(capsys: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve-teacher", "no/such/model", "--port", port]) == ConfigError.exit_code
    assert f"port {port} is not available" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["/teacher", "/head", "/rows", "/", "/docs", "/no-such"])
def test_no_route_answers_without_the_token(guarded: str, path: str) -> None:
    wrong = ["", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", TOKEN, f"bearer {TOKEN}"]
    for bearer in [*wrong, f"Basic {TOKEN}", "Bearer \xff"]:
        for method in ("GET", "POST", "OPTIONS"):
            answer = request(guarded, method, path, b"{}", {"authorization": bearer} if bearer else {})
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"


def test_with_the_token_it_answers(guarded: str) -> None:
    assert asked(guarded, authorization=f"Bearer {TOKEN}").status == 200
    rows = OwnServer(Connection(guarded, TOKEN), k=4).top_k([([5, 9, 33], [0, 1])])
    assert rows[0].ids.shape == (2, 4)


def test_a_page_of_another_name_does_not_reach_a_server_without_a_token(served: Any) -> None:
    url, _ = served
    assert asked(url, host="attacker.example").status == 421
    assert asked(url, host="localhost:1").status == 200
    assert request(url, "POST", "/rows", GOOD, {"content-type": "text/plain"}).status == 415


def question(**keys: Any) -> bytes:
    return json.dumps({"ids": [[5, 9, 33, 2]], "places": [[0, 1]], "k": 4, **keys}).encode()


WRONG: dict[str, tuple[int, bytes]] = {
    "10,000 samples": (413, question(ids=[[1, 2]] * 10_000, places=[[0]] * 10_000)),
    "a sample longer than the model": (413, question(ids=[[1] * 65], places=[[0]])),
    "K = 1,000,000": (422, question(k=10**6)),
    "K = 0": (422, question(k=0)),
    "K = true": (422, question(k=True)),
    "K = 4.0": (422, question(k=4.0)),
    "an id of -1": (422, question(ids=[[5, -1, 3]])),
    "an id of 2^31": (422, question(ids=[[5, 2**31, 3]])),
    "an id of 10^400": (422, question(ids=[[5, 10**400, 3]])),
    "an id beyond the vocabulary": (422, question(ids=[[5, VOCABULARY, 3]])),
    "an id that is a float": (422, question(ids=[[5, 1.0, 3]])),
    "an id that is text": (422, question(ids=[[5, "1", 3]])),
    "an id that is true": (422, question(ids=[[5, True, 3]])),
    "an id of NaN": (422, b'{"ids": [[1, NaN]], "places": [[0]], "k": 4}'),
    "a place of -1": (422, question(places=[[-1]])),
    "a place beyond the sample": (422, question(places=[[3]])),
    "places that go back": (422, question(places=[[1, 0]])),
    "a place twice": (422, question(places=[[1, 1]])),
    "no places": (422, question(places=[[]])),
    "places of fewer samples": (422, question(places=[])),
    "no samples": (422, question(ids=[], places=[])),
    "a sample of one token": (422, question(ids=[[1]], places=[[0]])),
    "a sample that is an object": (422, question(ids=[{}])),
    "lists 100,000 deep": (422, b"[" * 100_000),
    "objects 100,000 deep": (422, b'{"ids":' * 100_000),
    "a key too many": (422, question(model="x")),
    "a key too few": (422, b'{"ids": [[1, 2]], "places": [[0]]}'),
    "no object": (422, b"[]"),
    "no JSON": (422, b"<xml/>"),
    "no UTF-8": (422, b"\xff\xfe"),
    "nothing": (422, b""),
    "cut JSON": (422, GOOD[:-5]),
}  # fmt: skip


def test_wrong_questions_are_refused_and_the_server_stays_well(served: Any) -> None:
    url, process = served
    assert asked(url).status == 200
    before = resident(process)
    for what, (status, body) in WRONG.items():
        answer = asked(url, body)
        assert answer.status == status, (what, answer.body)
        assert json.loads(answer.body)["error"] and len(answer.body) < 400, what
    for method, path in (("GET", "/rows"), ("DELETE", "/teacher"), ("GET", "/../head/x"), ("POST", "/head")):
        assert request(url, method, path).status in (404, 405)
    assert asked(url).status == 200
    assert resident(process) - before < 200e6


def test_a_body_of_100_megabytes_is_not_read(served: Any) -> None:
    url, process = served
    before = resident(process)
    with socket.create_connection(address(url)) as announced:
        announced.sendall(b"POST /rows HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                          b"content-length: 100000000\r\n\r\n")  # fmt: skip
        assert announced.recv(65536).startswith(b"HTTP/1.1 413")
    with socket.create_connection(address(url)) as chunked:
        chunked.sendall(b"POST /rows HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"transfer-encoding: chunked\r\n\r\n")  # fmt: skip
        with contextlib.suppress(OSError):  # it hangs up
            for _ in range(100):
                chunked.sendall(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
        try:
            answered = chunked.recv(65536)
        except ConnectionResetError:
            answered = b"HTTP/1.1 413"  # the answer was dropped with the rest
        assert answered.startswith(b"HTTP/1.1 413")
    assert resident(process) - before < 200e6
    assert asked(url).status == 200


def test_two_hundred_connections_are_served_or_told_to_come_back(served: Any) -> None:
    url, _ = served
    found: list[int] = []

    def one() -> None:
        try:
            found.append(asked(url).status)
        except (OSError, http.client.HTTPException):
            found.append(0)  # dropped at the door

    threads = [threading.Thread(target=one) for _ in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 200 and set(found) <= {200, 429, 503, 0}
    assert 200 in found  # how many depends on how many of them are connected at once
    assert asked(url).status == 200


def test_slow_clients_are_hung_up_on_and_others_served_meanwhile(pair: Path) -> None:
    limits = Limits(reading=1.0, idle=1.0)
    with own_server(str(pair / "teacher"), limits=limits) as url:
        head = b"POST /rows HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 90\r\n"
        slow = [socket.create_connection(address(url)) for _ in range(20)]
        for at, one in enumerate(slow):
            # nothing, part of the headers, the headers, part of the body; or an answered request and half of a next one
            one.sendall([b"", b"POST /ro", head + b"x: ", head + b"\r\n", head + b"\r\n{"][at % 5])
        started = time.monotonic()
        while time.monotonic() - started < 1.5:  # one byte now and then does not help
            assert asked(url).status == 200
            for at, one in enumerate(slow):
                if at % 5 == 2:
                    with contextlib.suppress(OSError):
                        one.sendall(b"z")
            time.sleep(0.2)
        for one in slow:
            one.settimeout(5)
            try:
                left = one.recv(65536)
            except ConnectionResetError:
                left = b""
            assert left == b"" or left.startswith(b"HTTP/1.1 408")
            one.close()


def test_a_second_request_that_never_ends_is_hung_up_on(pair: Path) -> None:
    limits = Limits(reading=0.5, idle=5.0)
    with (
        own_server(str(pair / "teacher"), limits=limits) as url,
        socket.create_connection(address(url)) as one,
    ):
        one.settimeout(5)
        one.sendall(b"GET /teacher HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert one.recv(65536).startswith(b"HTTP/1.1 200")
        one.sendall(b"GET /teac")
        started = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            while one.recv(65536):
                pass
        assert time.monotonic() - started < 3


def test_a_client_that_vanishes_takes_nobody_along(served: Any) -> None:
    url, process = served
    long = question(ids=[[7] * 60] * 60, places=[list(range(59))] * 60, k=None)
    for _ in range(8):
        with socket.create_connection(address(url)) as one:
            one.sendall(b"POST /rows HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                        b"content-length: %d\r\n\r\n" % len(long) + long)  # fmt: skip
    assert asked(url).status == 200
    assert process.poll() is None


def test_too_many_waiting_samples_are_told_to_come_back(pair: Path) -> None:
    with own_server(str(pair / "teacher"), limits=Limits(waiting=3)) as url:
        answer = asked(url, question(ids=[[1, 2, 3]] * 4, places=[[0]] * 4))
        assert answer.status == 503 and answer.headers["retry-after"] == "1"
        assert asked(url).status == 200


def test_sigterm_ends_it_cleanly_after_what_is_under_way(served: Any) -> None:
    url, process = served
    idle = socket.create_connection(address(url))
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    idle.close()
    assert process.stderr is not None and process.stderr.read() == ""
