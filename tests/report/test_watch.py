"""Runs in a terminal: what state they are in, and how one goes on."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from report.written_run import write_run
from selectkd.cli import main
from selectkd.data.durable import sealed
from selectkd.errors import NumericsError
from selectkd.report.lenient import Growing
from selectkd.report.live import lines, screen, sparkline, time_left
from selectkd.report.page import page
from selectkd.report.run_files import at_work, read_run
from selectkd.training.run_folder import noting_errors
from selectkd.training.run_lock import locked


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """Runs in the four states; the running one is held by this process."""
    folder = tmp_path_factory.mktemp("all")
    write_run(folder / "finished")
    write_run(folder / "deep" / "broken", finished=False)
    failed = write_run(folder / "failed", finished=False)
    with pytest.raises(NumericsError), noting_errors(failed):
        raise NumericsError("step 3: loss nan")
    write_run(folder / "running", finished=False)
    (folder / "no run").mkdir()
    return folder


@pytest.fixture
def held(folder: Path) -> Iterator[Path]:
    with locked(folder / "running"):
        yield folder / "running"


def test_runs_lists_every_run_with_its_state_and_verdict(folder: Path, held: Path, capsys: Any) -> None:
    assert main(["runs", str(folder), "--json", "-"]) == 0
    found = {Path(row["run"]).name: row for row in json.loads(capsys.readouterr().out)}
    assert {name: row["state"] for name, row in found.items()} == {
        "finished": "finished", "broken": "broken off", "failed": "failed", "running": "running",
    }  # fmt: skip
    assert found["failed"]["verdict"][0] == "The run failed at step 20 of 20: step 3: loss nan"
    assert found["finished"]["kl_after"] == 0.75 and found["finished"]["step"] == 20
    assert main(["runs", str(folder)]) == 0
    assert "broken off" in capsys.readouterr().out
    assert main(["runs", str(folder / "no run")]) == 0 and main(["runs", str(folder / "none")]) == 2


def test_a_lock_counts_while_its_process_holds_it(folder: Path, held: Path) -> None:
    assert at_work(held)
    left = folder / "deep" / "broken"
    left.joinpath(".lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert not at_work(left), "the process is alive, and holds another run"
    left.joinpath(".lock").write_text("process 99999999 on elsewhere\n")
    assert at_work(left), "another host, and the files are new"
    os.utime(left / "metrics.jsonl", (1, 1))
    os.utime(left / ".lock", (1, 1))
    assert not at_work(left)


def test_reading_a_lock_never_holds_it(held: Path) -> None:
    """A reader that took the lock for a moment would make a run that begins then refuse its folder."""
    at_work(held)
    with pytest.raises(BlockingIOError), (held / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_watch_prints_a_line_a_step_in_a_pipe_and_ends_with_the_run(folder: Path, capsys: Any) -> None:
    assert main(["watch", str(folder / "finished")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("held-out text: kl 2.00  perplexity 12.0")
    assert lines[1].startswith("step 1/20  loss 2.00  TAR 0.320  101 tokens/s")
    assert lines[-1] == "finished: finished at step 20" and len(lines) == 1 + 20 + 3
    assert main(["watch", str(folder / "no run")]) == 2


def test_the_screen_of_a_run_has_its_progress_curves_and_text(folder: Path, held: Path) -> None:
    run = read_run(held, with_looks=False)
    with (folder / "screen").open("w+") as file:
        Console(file=file, width=100, color_system=None).print(screen(run))
        file.seek(0)
        said = file.read()
    assert "step 20 of 20" in said and "3.00 GiB" in said and "held-out KL" in said
    assert "█" in said and "France" in said


def test_time_left_is_at_the_pace_of_the_newest_steps(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False)
    rows = [{"step": step, "time": step * 2.0, "tokens_per_second": 1.0} for step in range(1, 11)]
    run.joinpath("timings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert time_left(read_run(run)) == pytest.approx((20 - 10) * 2.0)
    assert sparkline([1.0] * 100) == "▁" * 34 and sparkline([]) == ""


def broken(run: Path, name: str, change: Any) -> None:
    """Changes the object in a JSON file of a run, or in the last line of a JSONL file."""
    path = run / name
    *before, last = path.read_text("utf-8").splitlines() if name.endswith("l") else [path.read_text("utf-8")]
    path.write_text("\n".join([*before, json.dumps({**json.loads(last), **change})]) + "\n", "utf-8")


STRANGE = (float("nan"), 10**400, -1e308, "[/x]\x1b[2J", [1], {"a": {"b": []}}, True)


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_values_of_another_kind_are_left_out_and_named(value: Any, tmp_path: Path) -> None:
    """Of a later version, or of somebody who means harm."""
    run = write_run(tmp_path / "[red] \u202e\n$(id)", texts=2, tokens=4)
    odd = dict.fromkeys(("loss", "tar", "lr", "streams", "skipped", "grad_norm"), value)
    broken(run, "metrics.jsonl", odd)
    broken(run, "timings.jsonl", {"time": value, "peak_bytes": value, "tokens_per_second": value})
    broken(
        run,
        "manifest.json",
        dict.fromkeys(("before", "seconds", "skipped_steps", "versions", "config"), value),
    )
    (run / "compared.json").write_text(json.dumps([{"selection": value, "held_out_kl": value}]))
    (run / "deep.json").write_text("[" * 5000)
    found = read_run(run)
    assert found.state == "finished" and found.unread and found.last_step == 20
    said = page([found])
    assert "Not read" in said and "\u202e" not in said and "\\u202e" in said
    assert "&#39;" in said, "commands are quoted for a shell"
    with (tmp_path / "screen").open("w+") as file:
        Console(file=file, width=100).print(screen(found))
        file.seek(0)
        assert "[red]" in file.read(), "no markup of the terminal's"
    assert len(list(lines(found, -1))) == 23


def test_a_damaged_line_is_left_out_and_a_list_for_a_manifest_is_none(tmp_path: Path, capsys: Any) -> None:
    run = write_run(tmp_path / "run\nforged  finished")
    content = (run / "metrics.jsonl").read_bytes().split(b"\n")
    content[3] = b"\x00\xff"
    (run / "metrics.jsonl").write_bytes(b"\n".join(content))
    (run / "manifest.json").write_text("[1]")
    (run / "run.json").write_bytes(sealed({"format": 2, "run": {"training.max_steps": "many"}}))
    found = read_run(run)
    assert len(found.steps) == 19 and found.planned is None and found.state == "broken off"
    assert [one.partition(" ")[0] for one in found.unread] == ["metrics.jsonl:4", "manifest.json", "run.json"]
    assert main(["runs", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2, "a name has no line of its own"


def test_of_a_growing_file_only_the_new_lines_are_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"ste')
    growing = Growing(path, {})
    assert [line["step"] for line in growing.read()] == [1, 2]
    first = growing.lines[0]
    with path.open("a") as file:
        file.write('p": 3}\n')
    assert [line["step"] for line in growing.read()] == [1, 2, 3] and growing.lines[0] is first
    path.write_text('{"step": 1}\n{"step": 7}\n{"step": 8}\n{"step": 9}\n')
    assert [line["step"] for line in growing.read()] == [1, 7, 8, 9], "a resumed run goes on elsewhere"


@pytest.mark.parametrize("columns", [80, 120, 200])
def test_the_list_of_runs_fits_a_terminal(
    columns: int, folder: Path, held: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.chdir(folder.parent)
    assert main(["runs", folder.name]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    assert sum("The run" in line for line in lines) >= 3, "verdicts are shown at any width"
