"""Our own server and its client, over real connections: the rows of the model, and nothing for a wrong question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.errors import ConfigError, TeacherError
from selectkd.models.load import load_model
from selectkd.teachers.remote.answers import WrongAnswer
from selectkd.teachers.remote.connection import Connection
from selectkd.teachers.remote.own import OwnServer
from selectkd.teachers.remote.wire import answer_bytes, question_bytes, read_answer
from selectkd.training.run import train
from teachers.ours import own_server
from teachers.test_cached_runs import losses
from training.tiny import VOCABULARY, WORDS, tiny_tokenizer

Made = Callable[..., str]
SAMPLES = [([5, 9, 33, 2, 17, 60, 8], [1, 2, 5]), ([7, 7, 8], [0]), ([4] * 30, list(range(29)))]


@pytest.fixture(scope="module")
def url(pair: Path) -> Iterator[str]:
    with own_server(str(pair / "teacher")) as address:
        yield address


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: Any) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "selectkd" / "heads"


def test_hidden_states_and_best_tokens_are_those_of_the_model(url: str, pair: Path) -> None:
    model = load_model(str(pair / "teacher")).model
    server = OwnServer(Connection(url), k=6)
    head = server.head()
    for (ids, places), hidden, best in zip(
        SAMPLES, server.hidden(SAMPLES), server.top_k(SAMPLES), strict=True
    ):
        with torch.no_grad():
            expected = torch.log_softmax(model(torch.tensor([ids])).logits[0, places], -1)
        torch.testing.assert_close(torch.log_softmax(head.logits(hidden), -1), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(best.logp, expected.topk(6).values, atol=1e-5)
        assert (best.ids == expected.topk(6).indices.numpy()).all()
    server.connection.close()


@pytest.mark.parametrize("k", [None, VOCABULARY])
def test_a_run_with_our_own_server_has_the_losses_of_a_live_teacher(
    recipe: Made, pair: Path, url: str, k: int | None
) -> None:
    live = losses(recipe({"model": str(pair / "teacher")}, run="live"))
    teacher = {"url": url, "kind": "selectkd", **({} if k is None else {"k": k})}
    torch.testing.assert_close(losses(recipe(teacher, run="remote")), live, rtol=0, atol=1e-5)


def test_samples_that_are_read_together_have_the_rows_they_have_alone(pair: Path, url: str) -> None:
    alone = OwnServer(Connection(url)).hidden(SAMPLES * 4)
    with own_server(str(pair / "teacher"), batch=8) as together:
        for one, other in zip(alone, OwnServer(Connection(together)).hidden(SAMPLES * 4), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_the_head_is_fetched_once_and_a_damaged_copy_is_fetched_again(url: str, kept: Path) -> None:
    weight = OwnServer(Connection(url)).head().weight
    [copy] = kept.iterdir()
    sound = copy.read_bytes()
    copy.write_bytes(sound[:-1] + b"x")
    assert torch.equal(OwnServer(Connection(url)).head().weight, weight)
    assert copy.read_bytes() == sound


def test_averaging_takes_a_server_that_gives_hidden_states(recipe: Made, pair: Path, url: str) -> None:
    model = str(pair / "teacher")
    two = recipe({"model": model}, run="two")
    teachers = (
        f'[{{"model": "{model}", "weight": 1.0}}, {{"url": "{url}", "kind": "selectkd", "weight": 2.0}}]'
    )
    result = train(load_recipe(two, [f"teacher={teachers}"]))
    assert result.steps == 6


def test_a_server_with_another_tokenizer_or_model_is_refused(
    recipe: Made, pair: Path, tmp_path: Path, url: str
) -> None:
    path = recipe({"url": url, "kind": "selectkd"})
    tiny_tokenizer([*WORDS[1:], WORDS[0]]).save_pretrained(tmp_path / "student")
    student: Any = load_model(str(pair / "student")).model
    student.save_pretrained(tmp_path / "student")
    with pytest.raises(ConfigError, match="another tokenizer than the student has"):
        train(load_recipe(path, [f"student.model={tmp_path / 'student'}"]))
    with pytest.raises(TeacherError, match=r"and teacher\.model = other"):
        train(load_recipe(path, ["teacher.model=other"]))


def test_the_doctor_knows_our_own_server(url: str, capsys: Any) -> None:
    assert main(["teacher", "doctor", url]) == 0
    said = capsys.readouterr().out
    assert "selectkd, model" in said and "prompts with images: kind selectkd gets token ids alone" in said


BEST = {
    "ids": torch.tensor([[3, 1], [2, 0]], dtype=torch.int32),
    "logp": torch.tensor([[0.5, 0.25], [1.0, 0.0]]).log(),
    "tail": torch.tensor([0.25, 0.0]),
}
BAD_ROWS: list[dict[str, Any]] = [
    {"ids": BEST["ids"].long()},
    {"ids": BEST["ids"].float()},
    {"ids": torch.tensor([[3, 3], [2, 0]], dtype=torch.int32)},
    {"ids": torch.tensor([[-1, 3], [2, 0]], dtype=torch.int32)},
    {"ids": torch.tensor([[4, 3], [2, 0]], dtype=torch.int32)},
    {"ids": BEST["ids"][:, :1]},
    {"logp": BEST["logp"].double()},
    {"logp": BEST["logp"] + 0.5},
    {"logp": BEST["logp"] * torch.nan},
    {"logp": torch.full((2, 2), -torch.inf), "tail": torch.ones(2)},
    {"logp": torch.tensor([[0.5, 0.1], [1.0, 0.0]]).log(), "tail": torch.tensor([0.4, 0.0])},
    {"logp": BEST["logp"][:1]},
    {"tail": torch.tensor([0.3, 0.1])},
    {"tail": torch.tensor([torch.nan, 0.1])},
    {"tail": BEST["tail"][:, None]},
    {"tail": None},
    {"ids": None},
    {"logp": None},
]


def rows_behind(tensors: dict[str, Any]) -> Any:
    """What the client makes of a server whose answer to any question are these tensors."""

    def carry(request: httpx2.Request) -> httpx2.Response:
        body = request.content
        about = {"model": "m", "dtype": "float32", "weights": "w", "tokenizer": "t", "template": "", "revision": None,
                 "vocabulary": 4, "width": 3, "max_length": None,
                 "head": {"checksum": "0" * 32, "size": 99, "scale": 1.0, "softcap": None}}  # fmt: skip
        if request.url.path == "/rows":
            content = answer_bytes(tensors, question=body, weights="w")
            return httpx2.Response(200, stream=httpx2.ByteStream(content))
        return httpx2.Response(200, stream=httpx2.ByteStream(json.dumps(about).encode()))

    connection = Connection("http://teacher", retries=0, wait=0.0, transport=httpx2.MockTransport(carry))
    try:
        return OwnServer(connection, k=2).top_k([([1, 2, 3], [0, 1])])[0]
    finally:
        connection.close()


def test_best_tokens_that_cannot_be_are_refused_from_our_own_server_too() -> None:
    rows = rows_behind(BEST)
    assert rows.ids.tolist() == BEST["ids"].tolist() and np.isneginf(rows.logp[1, 1])
    for change in BAD_ROWS:
        changed = {name: value for name, value in {**BEST, **change}.items() if value is not None}
        with pytest.raises(TeacherError):
            rows_behind(changed)


def test_a_server_of_other_weights_ends_the_run(recipe: Made, pair: Path, capsys: Any) -> None:
    with own_server(str(pair / "teacher")) as first, own_server(str(pair / "student")) as second:
        server = OwnServer(Connection(first, retries=0))
        server.hidden(SAMPLES[:1])
        server.connection.close()
        server.connection = Connection(
            second, retries=0
        )  # the same address, after a restart with another model
        with pytest.raises(TeacherError, match="rows of another model"):
            server.hidden(SAMPLES[:1])
        server.connection.close()


def test_every_flipped_bit_of_an_answer_and_every_cut_is_found() -> None:
    question = question_bytes([1, 2, 3], [0, 1], None)
    answer = answer_bytes({"hidden": torch.randn(2, 3)}, question=question, weights="w")
    assert read_answer(answer, question=question, weights="w", rows=2)["hidden"].shape == (2, 3)
    for bit in range(8 * len(answer)):
        bad = bytearray(answer)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            found = read_answer(bytes(bad), question=question, weights="w", rows=2)
        except WrongAnswer:
            continue
        assert torch.equal(
            found["hidden"], read_answer(answer, question=question, weights="w", rows=2)["hidden"]
        )
    for cut in range(len(answer)):
        with pytest.raises(WrongAnswer):
            read_answer(answer[:cut], question=question, weights="w", rows=2)
    for keys in ({"question": b"{}"}, {"weights": "v"}, {"rows": 3}):
        with pytest.raises(WrongAnswer):
            read_answer(answer, **{"question": question, "weights": "w", "rows": 2, **keys})
