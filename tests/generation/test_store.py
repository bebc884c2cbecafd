"""``selectkd generate``: a file of texts that is gone on with, read like any other, and trained on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.cli.app import main
from selectkd.config import load_recipe
from selectkd.rollouts.generate import Request, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.training.run import train
from training.tiny import VOCABULARY, recipe_of, tiny_llama, tiny_tokenizer, write_pair


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    root = tmp_path_factory.mktemp("written")
    write_pair(root, tiny_llama(1, layers=3))
    return root


@pytest.fixture
def recipe(folder: Path, tmp_path: Path) -> Path:
    content = {
        **recipe_of(folder, data={"max_new_tokens": 7}),
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 1,
            "batch_size": 4,
            "max_length": 24,
            "max_prompt_length": 12,
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return path


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_generate_writes_the_teachers_text_and_a_cut_file_is_gone_on_with(
    recipe: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "texts.jsonl"
    command = ["generate", str(recipe), "--out", str(file), "--set", "method=seqkd"]
    assert main(command) == 0
    whole = file.read_bytes()
    records = lines(file)
    assert len(records) == 24 and len({json.dumps(r["input_ids"]) for r in records}) == 24
    teacher = tiny_llama(1, layers=3)
    for record in records[:3]:
        assert record["written_by"] == "teacher" and record["model"] == str(folder / "teacher")
        assert record["sampling"] == {"temperature": 0.0, "top_p": 1.0, "top_k": None, "max_new_tokens": 7}
        prompt = record["input_ids"][: record["completion_mask"].index(1)]
        again = generate([teacher], [Request(prompt, 7)], Draw(Sampling(0.0)), ends={2}, width=VOCABULARY)
        assert record["input_ids"][len(prompt) :] == again[0].ids
    file.write_bytes(whole[: len(whole) // 2])  # killed in the middle of a line
    assert main(command) == 0
    assert file.read_bytes() == whole
    assert main(command) == 0 and "24 existed" in capsys.readouterr().out
    assert main([*command, "--set", "training.seed=7"]) == 3
    assert "with seed 42; this command has 7" in capsys.readouterr().err.replace("\n", " ")
    assert main(["data", "show", str(file), "--tokenizer", str(folder / "student")]) == 0
    assert "[[" in capsys.readouterr().out


def test_pairs_are_two_sources_of_one_file_with_an_objective_each(recipe: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    assert main(["generate", str(recipe), "--out", str(file), "--set", "method=distillm2"]) == 0
    written = [record["written_by"] for record in lines(file)]
    assert written.count("teacher") == written.count("student") == 24
    sources = ", ".join(f"{{path: {file}, name: {one}, written_by: {one}}}" for one in ("teacher", "student"))
    changes = ["method={name: distillm2, stored: true}", f"data.sources=[{sources}]"]
    result = train(load_recipe(recipe, changes))
    last = json.loads((result.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()[-2])
    assert last["step"] == 1 and set(last["streams"]) <= {"teacher", "student"}


def test_several_texts_of_a_prompt_differ_and_prompts_that_stand_twice_are_written_once(
    recipe: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twice = tmp_path / "twice.jsonl"
    rows = (folder / "text.jsonl").read_text("utf-8").splitlines()[:4]
    twice.write_text("\n".join([*rows, *rows]) + "\n", "utf-8")
    file = tmp_path / "copies.jsonl"
    changes = ["--set", f"data.sources=[{{path: {twice}}}]", "--by", "student", "--copies", "2"]
    assert main(["generate", str(recipe), "--out", str(file), *changes]) == 0
    records = lines(file)
    assert len(records) == 8 and "duplicate prompts 4" in capsys.readouterr().out
    assert len({json.dumps(record["input_ids"]) for record in records}) > 4


@pytest.fixture
def server() -> Iterator[Callable[..., str]]:
    """A server of completions whose model is the tiny teacher: url(ids=True) gives token ids, else text alone."""
    teacher, tokenizer = tiny_llama(1, layers=3), tiny_tokenizer()
    running: list[ThreadingHTTPServer] = []

    def url(*, ids: bool) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                if asked["model"] != "tiny":
                    self.send_error(404)
                    return
                rule = Draw(Sampling(asked["temperature"], asked["top_p"]))
                request = Request(asked["prompt"], asked["max_tokens"])
                (text,) = generate([teacher], [request], rule, ends={2}, width=VOCABULARY)
                choice = {
                    "text": tokenizer.decode(text.ids[:-1] if text.ended else text.ids),
                    "finish_reason": "stop" if text.ended else "length",
                    **({"token_ids": text.ids} if ids else {}),
                }
                body = json.dumps({"choices": [choice]}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None: ...

        made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=made.serve_forever, daemon=True).start()
        running.append(made)
        return f"http://127.0.0.1:{made.server_port}"

    yield url
    for one in running:
        one.shutdown()
        one.server_close()


@pytest.mark.parametrize("ids", [True, False])
def test_a_server_writes_what_the_model_in_memory_would(
    ids: bool, recipe: Path, tmp_path: Path, server: Callable[..., str]
) -> None:
    command = ["generate", str(recipe), "--set", "method=seqkd"]
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    assert main([*command, "--out", str(here)]) == 0
    where = ["--server", server(ids=ids), "--server-model", "tiny"]
    assert main([*command, "--out", str(there), *where]) == 0
    names = ("input_ids", "completion_mask", "ended", "shown")
    assert [{n: r[n] for n in names} for r in lines(there)] == [{n: r[n] for n in names} for r in lines(here)]


def test_a_server_that_cannot_is_a_teacher_error(
    recipe: Path, tmp_path: Path, server: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(recipe), "--out", str(tmp_path / "x.jsonl"), "--server", server(ids=True)]
    assert main([*command, "--server-model", "other"]) == 4
    assert "status 404" in capsys.readouterr().err
    assert main(command) == 2  # no name for the model
    gone = [
        "generate",
        str(recipe),
        "--out",
        str(tmp_path / "x.jsonl"),
        "--server",
        "http://127.0.0.1:9",
        "--server-wait",
        "0",
    ]
    assert main([*gone, "--server-model", "tiny"]) == 4


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (["--by", "nobody"], "must be teacher"),
        (["--out", "x.txt"], ".jsonl file"),
        (["--out", "no/x.jsonl"], "folder"),
    ],
)
def test_what_generate_cannot_do_is_said(
    said: list[str], told: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(recipe), "--out", str(tmp_path / "y.jsonl"), *said]) == 2
    assert told in capsys.readouterr().err


def test_a_file_that_is_no_record_of_text_is_named_with_its_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text('{"prompt": "a", "completion": "b"}\n', "utf-8")
    assert main(["generate", str(recipe), "--out", str(file)]) == 3
    assert "other.jsonl:1" in capsys.readouterr().err
