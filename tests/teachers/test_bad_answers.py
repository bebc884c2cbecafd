"""Answers that are wrong in more than a thousand ways, through the client as it is: not one may become a row."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from selectkd.errors import TeacherError
from selectkd.teachers.remote.connection import Connection
from selectkd.teachers.remote.server import TopKServer
from teachers.served import openai, sglang, vllm
from training.tiny import VOCABULARY

K = 4
MADE = {"vllm": vllm, "sglang": sglang, "openai": openai}
IDS = [5, 9, 33, 2, 17, 60, 8, 41]
PLACES = [1, 2, 4, 6]
LOGP = torch.log_softmax(
    3 * torch.randn(len(IDS), VOCABULARY, generator=torch.Generator().manual_seed(3)), -1
)
JUNK = [None, True, "x", "-1.0", [], {}, [None], float("nan"), float("inf"), 1e999]


def server(kind: str, answers: Callable[[], tuple[int, dict[str, str], bytes]], **keys: Any) -> TopKServer:
    def carry(request: httpx2.Request) -> httpx2.Response:
        status, headers, body = answers()
        return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(body))

    carried = httpx2.MockTransport(carry)
    keys = {"retries": 0, "wait": 0.0, "timeout": 5.0, **keys}
    return TopKServer(Connection("http://teacher", transport=carried, **keys), kind, K, VOCABULARY, "tiny")


def rows_of(kind: str, content: dict[str, Any]) -> Any:
    """Where the positions of an answer stand, in the answer itself."""
    if kind == "sglang":
        return content["meta_info"]["input_top_logprobs"]
    choice = content["choices"][0]
    return choice["prompt_logprobs"] if kind == "vllm" else choice["logprobs"]["top_logprobs"]


def set_logp(kind: str, row: Any, at: int, value: Any) -> None:
    key = at if kind == "sglang" else list(row)[at]
    if kind == "openai":
        row[key] = value
    else:
        row[key][0 if kind == "sglang" else "logprob"] = value


def move(kind: str, row: Any, at: int, by: float) -> None:
    entry = row[at if kind == "sglang" else list(row)[at]]
    value = entry[0] if kind == "sglang" else entry["logprob"] if kind == "vllm" else entry
    set_logp(kind, row, at, value + by)


def rename(kind: str, row: Any, at: int, name: Any) -> None:
    """The id of an entry, as another id or as something that is none."""
    if kind == "sglang":
        row[at][1] = name
        return
    entries = list(row.items())
    entries[at] = (
        f"token_id:{name}" if kind == "openai" and isinstance(name, int) else str(name),
        entries[at][1],
    )
    row.clear()
    row.update(entries)


def best_of(row: Any) -> Any:
    """The likeliest entry of vLLM's position."""
    return max(row.values(), key=lambda entry: entry["logprob"])


def broken_rows(kind: str, place: int) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Ways to break one position that is asked for: (what, how)."""
    at = place + 1
    size = K if kind == "sglang" else len(rows_of(kind, MADE[kind](IDS, LOGP, K))[at])
    for junk in [*JUNK, "<html>", 3]:
        yield f"position {at} is {junk}", lambda c, junk=junk: rows_of(kind, c).__setitem__(at, junk)
    for entry in range(size):
        for junk in [*JUNK, 0.5, 700.0, 10**400, -1e999]:
            yield (
                f"log-prob {entry} of {at} is {str(junk)[:9]}",
                lambda c, e=entry, j=junk: set_logp(kind, rows_of(kind, c)[at], e, j),
            )
        for name in ["the", "", "0x5", "-1", -1, 2**31, VOCABULARY, "05", "1.0", " 5", "\u0665"]:
            yield (
                f"id {entry} of {at} is {name!r}",
                lambda c, e=entry, n=name: rename(kind, rows_of(kind, c)[at], e, n),
            )
    yield (
        f"{at} has a constant taken off",
        lambda c: [move(kind, rows_of(kind, c)[at], e, -4.0) for e in range(size)],
    )
    if kind == "sglang":
        for name in range(1, K):
            yield (
                f"{at} has an id again as a further entry",
                lambda c, n=name: rows_of(kind, c)[at].append(list(rows_of(kind, c)[at][n])),
            )
        for junk in [None, True, "7", 1.5, [3]]:
            yield f"an id of {at} is {junk!r}", lambda c, j=junk: rename(kind, rows_of(kind, c)[at], 0, j)
        yield (
            f"{at} has an id twice",
            lambda c: rename(kind, rows_of(kind, c)[at], 0, rows_of(kind, c)[at][1][1]),
        )
        yield f"{at} has K - 1 entries", lambda c: rows_of(kind, c)[at].pop()
        yield (
            f"{at} has K + 2 entries",
            lambda c: rows_of(kind, c)[at].extend([[-30.0, 0, None], [-31.0, 1, None]]),
        )
    else:
        prefix = "token_id:" if kind == "openai" else ""
        worst = {"logprob": -30.0, "rank": 60} if kind == "vllm" else -30.0

        def more(c: Any) -> None:
            row = rows_of(kind, c)[at]
            free = [i for i in range(VOCABULARY) if f"{prefix}{i}" not in row]
            row.update({f"{prefix}{i}": worst for i in free[: K + 2 - len(row)]})

        def fewer(c: Any) -> None:
            row = rows_of(kind, c)[at]
            own = f"{prefix}{IDS[at]}"
            for key in [key for key in row if key != own][: len(row) - K + 1]:
                del row[key]

        def without_best(c: Any) -> None:
            """The likeliest goes, unless it is the text's own, and nothing comes in its place."""
            row = rows_of(kind, c)[at]
            likely = {key: entry["logprob"] for key, entry in row.items() if key != str(IDS[at])}
            del row[max(likely, key=likely.__getitem__)]

        if kind == "vllm":
            yield f"{at} lost its best entry", without_best
            for rank in [0, -1, 2, K + 1, 1.0, True, "1"]:
                yield (
                    f"a rank of {at} is {rank!r}",
                    lambda c, r=rank: best_of(rows_of(kind, c)[at]).__setitem__("rank", r),
                )
        else:
            own_logp = 0 if kind == "sglang" else at
            yield (
                f"{at} gives its own token two log-probabilities",
                lambda c: c["choices"][0]["logprobs"]["token_logprobs"].__setitem__(own_logp, -0.25),
            )
        yield f"{at} has K + 2 entries", more
        yield f"{at} has K - 1 entries", fewer
        yield f"{at} lacks its own token", lambda c: rows_of(kind, c)[at].pop(f"{prefix}{IDS[at]}")
    yield (
        f"{at} is all but impossible",
        lambda c: [set_logp(kind, rows_of(kind, c)[at], e, -9999.0) for e in range(size)],
    )
    yield (
        f"{at} has a mass above 1",
        lambda c: [set_logp(kind, rows_of(kind, c)[at], e, -0.2) for e in range(size)],
    )


def broken_answers(kind: str) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Ways to break an answer as a whole."""
    yield "a position fewer", lambda c: rows_of(kind, c).pop()
    yield "the first position fewer", lambda c: rows_of(kind, c).pop(0)
    yield "positions by one further", lambda c: rows_of(kind, c).insert(1, rows_of(kind, c).pop())
    yield "two positions more", lambda c: rows_of(kind, c).extend([rows_of(kind, c)[-1]] * 2)
    yield "a position 0 that is filled", lambda c: rows_of(kind, c).__setitem__(0, rows_of(kind, c)[1])
    yield "positions reversed", lambda c: rows_of(kind, c).reverse()
    names = ["meta_info"] if kind == "sglang" else ["choices"]
    for junk in [None, [], {}, "x", [None], [[]], 5, [{}], [{}, {}]]:
        yield f"{names[0]} is {junk}", lambda c, j=junk: c.__setitem__(names[0], j)
    for seed in range(8):
        at = seed % len(IDS)
        other = (IDS[at] + 1 + seed) % VOCABULARY
        if kind == "vllm":
            yield (
                f"token {at} came back as {other}",
                lambda c, a=at, o=other: c["choices"][0]["prompt_token_ids"].__setitem__(a, o),
            )
        elif kind == "openai":
            yield (
                f"token {at} came back as {other}",
                lambda c, a=at, o=other: c["choices"][0]["logprobs"]["tokens"].__setitem__(
                    a, f"token_id:{o}"
                ),
            )
        else:
            yield (
                f"token {at} came back as {other}",
                lambda c, a=at, o=other: c["meta_info"]["input_token_logprobs"][a].__setitem__(1, o),
            )
    inner = {
        "vllm": lambda c: c["choices"][0],
        "openai": lambda c: c["choices"][0]["logprobs"],
        "sglang": lambda c: c["meta_info"],
    }[kind]
    keys = {
        "vllm": ["prompt_logprobs"],
        "openai": ["tokens", "token_logprobs", "top_logprobs"],
        "sglang": ["input_token_logprobs", "input_top_logprobs"],
    }[kind]
    for key in keys:
        yield f"no {key}", lambda c, k=key: inner(c).pop(k)
        for junk in [None, "x", 3, {}, [], True, [None] * 3]:
            yield f"{key} is {junk}", lambda c, k=key, j=junk: inner(c).__setitem__(k, j)
    if kind == "vllm":
        yield (
            "prompt_token_ids as text",
            lambda c: inner(c).__setitem__("prompt_token_ids", [str(i) for i in IDS]),
        )
        yield "fewer prompt_token_ids", lambda c: inner(c).__setitem__("prompt_token_ids", IDS[:-1])


def bad_bodies(kind: str) -> Iterator[tuple[str, dict[str, str], bytes]]:
    """More than 400 answers of status 200 that are wrong: (what, headers, body)."""
    good = MADE[kind](IDS, LOGP, K)
    ways = [*broken_answers(kind), *(way for place in PLACES for way in broken_rows(kind, place))]
    for what, breaks in ways:
        content = copy.deepcopy(good)
        breaks(content)
        yield what, {}, json.dumps(content).encode()
    body = json.dumps(good).encode()
    chance = random.Random(0)
    for cut in [0, 1, len(body) - 1, *(chance.randrange(len(body)) for _ in range(40))]:
        yield f"cut at byte {cut}", {}, body[:cut]
    for junk in [b"<html><body>502 Bad Gateway</body></html>", b"null", b"[]", b"3", b'"x"', b"[[[]]]", b"\xff\xfe{}",
                 body + b"}", body + body, b"[" * 100_000, b'{"a":' * 100_000, b"data: " + body,
                 b'{"choices": NaN}', b"{'choices': []}", body.decode().encode("utf-16")]:  # fmt: skip
        yield f"{junk[:20]!r}", {}, junk
    text = body.decode()
    opened = {"vllm": '"prompt_logprobs": [null, {', "openai": '"top_logprobs": [null, {', "sglang": '{"'}[
        kind
    ]
    first = text.index(opened) + len(opened)
    name = {"vllm": '"7": {"logprob": -1.0, "rank": 1}, ', "openai": '"token_id:7": -1.0, '}.get(
        kind, 'text": "", "'
    )
    yield "a key twice", {}, (text[:first] + name + name + text[first:]).encode()
    for number in ["1e999", "-1e999", "NaN", "-Infinity"]:
        yield f"{number} somewhere", {}, ("{" + f'"usage": {{"cost": {number}}}, ' + text[1:]).encode()
    yield "gzip", {"content-encoding": "gzip"}, gzip.compress(body)
    yield "deflate", {"content-encoding": "deflate"}, body
    yield "a long body", {}, body + b" " * (1 << 20)


@pytest.mark.parametrize("kind", sorted(MADE))
def test_none_of_more_than_a_thousand_bad_answers_becomes_a_row(kind: str) -> None:
    good = json.dumps(MADE[kind](IDS, LOGP, K)).encode()
    told: list[str] = []
    current = (200, {}, good)
    asks = server(kind, lambda: current)  # type: ignore[arg-type,return-value]
    [rows] = asks.top_k([(IDS, PLACES)])
    expected = LOGP[PLACES].topk(K)
    np.testing.assert_allclose(np.sort(rows.logp, 1), expected.values.sort(1).values, atol=1e-6)
    assert [sorted(row) for row in rows.ids.tolist()] == expected.indices.sort(1).values.tolist()
    for what, headers, body in bad_bodies(kind):
        current = (200, headers, body)
        try:
            asks.top_k([(IDS, PLACES)])
        except TeacherError as error:
            told.append(str(error))
            assert error.exit_code == 4 and len(str(error).splitlines()) <= 6, what
        else:
            raise AssertionError(f"accepted: {what}")
    assert len(told) > 400, "three kinds of server make more than a thousand"
    current = (200, {}, good)
    assert (asks.top_k([(IDS, PLACES)])[0].ids == rows.ids).all(), "and the connection still works"
    asks.connection.close()


@pytest.mark.parametrize("kind", sorted(MADE))
def test_one_or_two_bad_answers_are_asked_for_again(kind: str) -> None:
    good = json.dumps(MADE[kind](IDS, LOGP, K)).encode()
    queue = [(200, {}, b"<html>"), (200, {}, good[:90]), (200, {}, good)]
    asks = server(kind, lambda: queue.pop(0), retries=2)
    assert asks.top_k([(IDS, PLACES)])[0].ids.shape == (len(PLACES), K)
    asks.connection.close()


def test_a_probability_of_zero_and_one_above_one_by_rounding_are_taken() -> None:
    content = vllm(IDS, LOGP, K)
    rows = content["choices"][0]["prompt_logprobs"]
    row = rows[2]
    own = str(IDS[2])
    for key in row:
        row[key]["logprob"] = -9999.0
    chosen = next(key for key in row if key != own)
    row[chosen]["logprob"] = 1e-6
    asks = server("vllm", lambda: (200, {}, json.dumps(content).encode()))
    [found] = asks.top_k([(IDS, [1])])
    assert sorted(found.logp[0].tolist())[-1] == 0.0 and np.isneginf(found.logp[0]).sum() == K - 1
    asks.connection.close()


def test_a_token_beyond_the_best_is_left_out_and_one_among_them_kept() -> None:
    content = vllm(IDS, LOGP, K)
    sizes = {len(row) for row in content["choices"][0]["prompt_logprobs"][1:]}
    assert sizes <= {K, K + 1} and K + 1 in sizes
    asks = server("vllm", lambda: (200, {}, json.dumps(content).encode()))
    [found] = asks.top_k([(IDS, list(range(len(IDS) - 1)))])
    best = LOGP[: len(IDS) - 1].topk(K).indices.sort(1).values
    assert [sorted(row) for row in found.ids.tolist()] == best.tolist()
    asks.connection.close()


def test_rows_of_every_token_have_a_mass_of_1_where_the_head_is_as_wide() -> None:
    flat = torch.log_softmax(LOGP / 9, -1)
    moved = vllm(IDS, flat - 0.05, VOCABULARY)
    asks = server("vllm", lambda: (200, {}, json.dumps(moved).encode()))
    asks.k = VOCABULARY
    asks.top_k([(IDS, PLACES)])  # dead rows of a wider head could have the rest
    asks.width = VOCABULARY
    with pytest.raises(TeacherError, match=r"has a mass of 0\.951"):
        asks.top_k([(IDS, PLACES)])
    asks.connection.close()


@pytest.mark.parametrize("kind", ["vllm", "openai"])
def test_what_vllm_0_32_answered_is_read_and_without_its_best_entry_refused(kind: str) -> None:
    """Recorded from vLLM 0.32.0 on a processor, a random Llama of 64 tokens in float32: prompt_logprobs, and echo."""
    content = json.loads(Path(__file__).with_name("vllm_0_32.json").read_text("utf-8"))[kind]
    asks = server(kind, lambda: (200, {}, json.dumps(content).encode()))
    [found] = asks.top_k([(IDS, PLACES)])
    rows = rows_of(kind, content)
    for place, ids, logp in zip(PLACES, found.ids.tolist(), found.logp.tolist(), strict=True):
        told = {
            int(key.removeprefix("token_id:")): entry["logprob"] if kind == "vllm" else entry
            for key, entry in rows[place + 1].items()
        }
        best = sorted(told, key=told.__getitem__, reverse=True)[:K]
        assert sorted(ids) == sorted(best)
        assert logp == pytest.approx([told[token] for token in ids])
    if kind == "vllm":
        for place in PLACES:
            broken = copy.deepcopy(content)
            row = rows_of(kind, broken)[place + 1]
            del row[next(key for key, entry in row.items() if entry["rank"] == 1)]
            asks = server(kind, lambda c=broken: (200, {}, json.dumps(c).encode()))
            with pytest.raises(TeacherError, match=r"one of the best is missing|lacks token"):
                asks.top_k([(IDS, PLACES)])
    asks.connection.close()
