"""What goes wrong while a checkpoint is written, or in mid-step: nothing is lost, nothing needs cleaning."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from faults.chaos import in_fork
from faults.forked import run_forked
from faults.tiny_run import left, recipe_for
from selectkd.cli import main
from selectkd.data.durable import FAULT
from selectkd.errors import ResourceError, TeacherError
from selectkd.models.save import save_student
from selectkd.teachers.live import LiveTeacher
from selectkd.training.checkpoint.folder import all_in, check
from selectkd.training.run import train
from training.tiny import tiny_llama, tiny_tokenizer

POINTS = [
    "part@12",
    "before manifest@2",
    "after manifest@2",
    "before rename@2",
    "after rename@2",
    "rotation@1",
]


@pytest.fixture(scope="module")
def whole(pair: Path, tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(recipe_for(pair, folder))
    return folder


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_at_each_point_of_a_save_leaves_a_checkpoint_to_go_on_from(
    point: str, pair: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for(pair, tmp_path / "run")

    def killed() -> None:
        monkeypatch.setenv(FAULT, f"{point}=kill")
        torch.set_num_threads(1)
        train(recipe)

    assert in_fork(killed) == -signal.SIGKILL
    sound = [path for path in all_in(tmp_path / "run" / "checkpoints") if check(path)]
    assert sound
    result = train(recipe)
    assert result.resumed_from == int(sound[0].name.removeprefix("step-"))
    assert left(tmp_path / "run") == left(whole)
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {
        "step-00000004",
        "step-00000006",
    }


@pytest.mark.parametrize("point", ["student", "moved aside", "replaced"])
def test_a_kill_while_the_student_is_saved_leaves_no_copy_behind(
    point: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer, folder = tiny_llama(2, layers=1), tiny_tokenizer(), tmp_path / "[a] student"
    save_student(model, tokenizer, folder, "the first")

    def killed() -> None:
        monkeypatch.setenv(FAULT, f"{point}=kill")
        save_student(model, tokenizer, folder, "the second")

    for _ in range(2):
        assert in_fork(killed) == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) <= 3  # what one kill left, not what two did
    monkeypatch.delenv(FAULT, raising=False)
    other = tmp_path / f".{folder.name}.partial-{os.getppid()}"  # of a process that is at work
    other.mkdir()
    save_student(model, tokenizer, folder, "the third")
    assert {path.name for path in tmp_path.iterdir()} == {folder.name, other.name}
    assert (folder / "README.md").read_text() == "the third"


@pytest.mark.parametrize("point", ["part@12", "before manifest@2"])
def test_a_disk_that_fills_up_ends_the_run_with_what_is_needed_and_free(
    point: str, pair: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, checkpoints = recipe_for(pair, tmp_path / "run"), tmp_path / "run" / "checkpoints"
    monkeypatch.setenv(FAULT, f"{point}=enospc")
    monkeypatch.setattr("selectkd.data.durable._passed", Counter())
    with pytest.raises(
        ResourceError, match=r"step-00000004: No space left.*[\d,]+ bytes are needed, [\d,]+ bytes are"
    ):
        train(recipe)
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000002"]
    check(checkpoints / "step-00000002")
    monkeypatch.delenv(FAULT)
    assert train(recipe).resumed_from == 2 and left(tmp_path / "run") == left(whole)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_real_disk_that_fills_up_goes_on_once_there_is_room(
    pair: Path, whole: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("this machine allows no mounting")
    try:
        with pytest.raises(ResourceError, match="bytes are needed"):
            train(recipe_for(pair, disk / "run"))
        assert not list((disk / "run" / "checkpoints").glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        train(recipe_for(pair, disk / "run"))
        assert left(disk / "run") == left(whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


class Failing:
    """A live teacher that is gone from its n-th answer on."""

    def __init__(self, teacher: LiveTeacher, answers: int) -> None:
        self.teacher, self.answers = teacher, answers

    def __call__(self, batch: Any, position: Any) -> Any:
        self.answers -= 1
        if self.answers < 0:
            raise TeacherError("the teacher is gone.")
        return self.teacher(batch, position)


def test_a_teacher_that_dies_in_mid_run_leaves_the_state_of_the_last_step(
    pair: Path, tmp_path: Path, caplog: Any
) -> None:
    setting: dict[str, Any] = {"accumulation": 3, "save_every": None}
    recipe = recipe_for(pair, tmp_path / "run", **setting)
    train(recipe_for(pair, tmp_path / "whole", **setting))

    def dies(made: Any) -> None:
        made.teacher = Failing(
            made.teacher, 2 + 1 + 2 * 3 + 1
        )  # looks, steps of 3, then in the middle of a step

    with pytest.raises(TeacherError, match="gone"):
        train(recipe, on_assembled=dies)
    assert "the same command resumes" in caplog.text
    assert train(recipe).resumed_from is not None
    assert left(tmp_path / "whole").items() <= left(tmp_path / "run").items()


def test_the_command_line_ends_with_75_at_a_sigterm_and_with_0_when_it_went_on(
    pair: Path, whole: Path, tmp_path: Path
) -> None:
    recipe = write(recipe_for(pair, tmp_path / "run"), tmp_path / "recipe.yaml")
    ran = run_forked("-c", SENDS.format(number=int(signal.SIGTERM)), str(recipe))
    assert ran.returncode == 75, ran.stderr
    assert "stopped by SIGTERM: the state of step 3 is in" in ran.stderr
    assert main(["train", str(recipe)]) == 0
    found, expected = left(tmp_path / "run"), left(whole)
    found.pop("generators-0.json")  # the progress bar draws from Python's generator, which no step does
    assert found.items() <= expected.items()


def test_a_second_signal_acts_at_once(pair: Path, tmp_path: Path) -> None:
    def twice() -> None:
        class Sends:
            def stage(self, name: str, total: int | None = None) -> None: ...

            def line(self, line: dict[str, Any]) -> None:
                if line["step"] == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

        train(recipe_for(pair, tmp_path / "run"), progress=Sends())  # step 3 has two lines: two signals

    assert in_fork(twice) == -signal.SIGTERM


SENDS = """
import os, sys
from selectkd.cli import main
from selectkd.training.record.progress import TrainingProgress

def line(self, said, tell=TrainingProgress.line):
    tell(self, said)
    if "loss" in said and said["step"] == 3:
        os.kill(os.getpid(), {number})

TrainingProgress.line = line
sys.exit(main(["train", sys.argv[1]]))
"""


def write(recipe: Any, path: Path) -> Path:
    """A recipe as a file; JSON is YAML."""
    path.write_text(json.dumps(recipe.model_dump(mode="json", exclude_none=True)), "utf-8")
    return path


def test_a_folder_that_cannot_be_used_ends_with_2_before_weights(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were loaded")
    )
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    for name in ("file", "full", "n" * 300, "file/under"):
        recipe = write(recipe_for(pair, tmp_path / name), tmp_path / "recipe.yaml")
        assert main(["train", str(recipe)]) == 2, name


def test_paths_with_spaces_and_emoji_hold_a_run(pair: Path, whole: Path, tmp_path: Path) -> None:
    odd = tmp_path / "a b ..c \N{SNOWMAN}\N{GRINNING FACE}"
    train(recipe_for(shutil.copytree(pair, odd / "pair"), odd / "run"))
    assert left(odd / "run")["metrics.jsonl"] == left(whole)["metrics.jsonl"]


def test_a_run_folder_moved_elsewhere_goes_on(pair: Path, whole: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(whole, tmp_path / "moved")
    (moved / "manifest.json").unlink()
    shutil.rmtree(moved / "student")
    assert train(recipe_for(pair, moved)).resumed_from == 6
    assert left(moved) == left(whole)


def test_a_cache_build_that_is_stopped_ends_with_75_and_goes_on(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    recipe = recipe_for(pair, tmp_path / "run", cache=tmp_path / "cache")
    path = write(recipe, tmp_path / "recipe.yaml")
    told: list[str] = []

    def stops(text: object) -> None:
        told.append(str(text))
        if str(text).startswith("shard 2 of"):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("selectkd.cli.cache.show_progress", stops)
    build = ["cache", "build", str(path), "--set", "teacher.shard_rows=32"]
    assert main(build) == 75
    assert "the shards that were done are in" in capsys.readouterr().err
    told.clear()
    assert main(build) == 0
    assert next(text for text in told if text.startswith("shard")).startswith("shard 3 of")
