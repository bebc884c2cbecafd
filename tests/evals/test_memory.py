"""An evaluation that is killed goes on where it was, to the same numbers; what was asked otherwise is asked again."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.chaos import in_fork
from selectkd.cli import main
from selectkd.data.durable import FAULT, add_lines, whole_lines
from selectkd.errors import DataError, ResourceError
from selectkd.evals import asking
from selectkd.evals.asking import Decoding, complete
from selectkd.evals.memory import Memory
from selectkd.models.load import Loaded, load_model

PROBLEMS = 11


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each call of the generator was asked for; the generator is the real one."""
    sizes, real = list[int](), asking.generate

    def counted(models: Any, requests: Any, *rest: Any, **options: Any) -> Any:
        sizes.append(len(requests))
        return real(models, requests, *rest, **options)

    monkeypatch.setattr(asking, "generate", counted)
    return sizes


@pytest.fixture
def verb(tiny_run: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command over eleven problems and two models, in batches of three: four batches a model."""
    problems = tmp_path / "problems.jsonl"
    rows = [{"question": "w2 " * (i % 4) + f"w{i} w5", "answer": f"#### {i}"} for i in range(PROBLEMS)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(name: str, *more: str) -> list[str]:
        said = {"memory": f"{name}.memory", "json": f"{name}.json", "answers": f"{name}.answers"}
        files = [part for flag, file in said.items() for part in (f"--{flag}", str(tmp_path / file))]
        return ["eval", str(tiny_run), "--compare", str(tiny_run.parent / "teacher"), "--suite", "math", "--data",
                str(problems), "--tokens", "9", "--batch-size", "3", *files, *more]  # fmt: skip

    return command


@pytest.mark.parametrize("batches", [1, 3, 6])
def test_a_killed_evaluation_goes_on_to_the_same_numbers_and_writes_nothing_twice(
    batches: int, verb: Callable[..., list[str]], tmp_path: Path, written: list[int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(verb("whole")) == 0 and sum(written) == 2 * PROBLEMS
    whole = list(written)

    def killed() -> None:
        monkeypatch.setenv(FAULT, f"lines@{batches}=kill")
        torch.set_num_threads(1)
        main(verb("cut"))

    assert in_fork(killed) == -signal.SIGKILL
    memory = tmp_path / "cut.memory"
    assert len(whole_lines(memory)) == batches and not (tmp_path / "cut.json").exists()
    with memory.open("ab") as file:  # and a line that the kill cut in two
        file.write(whole_lines(memory)[0][:40])
    written.clear()
    assert main(verb("cut")) == 0
    assert written == whole[batches:], "the batches that were left, and no other"
    for name in ("json", "answers", "memory"):
        assert (tmp_path / f"cut.{name}").read_bytes() == (tmp_path / f"whole.{name}").read_bytes()
    written.clear()
    capsys.readouterr()
    assert main(verb("cut")) == 0 and written == []
    assert f"{PROBLEMS} of {PROBLEMS} answers" in capsys.readouterr().err


def test_more_problems_ask_for_the_new_ones_alone(
    verb: Callable[..., list[str]], tmp_path: Path, written: list[int]
) -> None:
    assert main(verb("some", "--limit", "4")) == 0 and sum(written) == 8
    assert main(verb("some")) == 0 and sum(written) == 2 * PROBLEMS
    assert len(
        {key for line in whole_lines(tmp_path / "some.memory") for key in json.loads(line)["kept"]}
    ) == sum(written)


def test_a_changed_setting_model_or_prompt_never_reuses_an_answer(
    tiny_run: Path, tmp_path: Path, written: list[int]
) -> None:
    loaded, base = load_model(tiny_run / "student"), Decoding(4, temperature=0.5, seed=1)
    memory = Memory.opened(tmp_path / "m")

    def asked(
        model: Loaded = loaded, decoding: Decoding = base, prompt: list[int] | None = None, size: int = 2
    ) -> int:
        written.clear()
        complete(model, [prompt or [5, 9]], decoding, batch_size=size, memory=memory)
        return sum(written)

    assert asked() == 1 and asked() == 0
    changed = [
        {"max_new_tokens": 5}, {"temperature": 0.6}, {"top_p": 0.9}, {"stop": ("w3",)}, {"seed": 2},
    ]  # fmt: skip
    assert {key for one in changed for key in one} == set(vars(base)), "every setting there is"
    assert [asked(decoding=replace(base, **one)) for one in changed] == [1] * len(changed)
    assert asked(prompt=[5, 8]) == 1 and asked(size=3) == 1
    # the same folder name with other weights, another revision, another dtype, another end of text
    with torch.no_grad():
        next(loaded.model.parameters())[3, 0] += 1e-3
    assert asked() == 1
    assert asked(replace(loaded, revision="0" * 40)) == 1
    assert asked(replace(loaded, model=loaded.model.bfloat16())) == 1
    loaded.model.generation_config.eos_token_id = [2, 7]  # type: ignore[union-attr]
    assert asked() == 1 and asked() == 0


def test_two_draws_of_one_prompt_are_kept_apart(tiny_run: Path, tmp_path: Path, written: list[int]) -> None:
    loaded, drawn = load_model(tiny_run / "student"), Decoding(8, temperature=1.0)
    first = complete(loaded, [[5, 9]] * 3, drawn, memory=Memory.opened(tmp_path / "m"))
    assert len(set(first)) > 1
    assert complete(loaded, [[5, 9]] * 3, drawn, memory=Memory.opened(tmp_path / "m")) == first
    assert sum(written) == 3


def test_a_file_of_something_else_is_no_memory_and_stays_as_it_is(
    verb: Callable[..., list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (b'{"kept": {}}\nno json\n', b'{"kept": {}}\n{"key": "x"}\n', b'{"kept": {}}\n[1]\n'):
        (tmp_path / "bad.memory").write_bytes(content)
        assert main(verb("bad")) == 3
        assert "bad.memory:2" in capsys.readouterr().err
        assert (tmp_path / "bad.memory").read_bytes() == content
    with pytest.raises(DataError, match=":1 "):
        (tmp_path / "n").write_bytes(b"null\n")
        Memory.opened(tmp_path / "n")
    assert main(verb("x", "--memory", str(tmp_path))) == 2 and "is a folder" in capsys.readouterr().err


def test_a_full_disk_ends_in_7_and_loses_no_line_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "lines"
    add_lines(path, [{"a": 1}])
    before = path.read_bytes()
    import os

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match="bytes are free"):
        add_lines(path, [{"a": 2}])
    monkeypatch.undo()
    assert (
        path.read_bytes() == before
        and whole_lines(path) == [b'{"a": 1}']
        and whole_lines(tmp_path / "no") == []
    )
