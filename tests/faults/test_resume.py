"""A run that stops and goes on leaves what it would have left: the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from faults.tiny_run import left, recipe_for, steps_of
from selectkd.cli import main
from selectkd.errors import ConfigError, IntegrityError, Interrupted, Preempted
from selectkd.training.checkpoint.folder import check
from selectkd.training.run import train
from selectkd.training.run_folder import read_run, write_run
from training.tiny import tiny_llama


class StopsAt:
    """A listener that sends this process a signal when a line of a step is written."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def stage(self, name: str, total: int | None = None) -> None: ...

    def line(self, line: dict[str, Any]) -> None:
        if line["step"] == self.step:
            self.step = -1  # once: a second signal acts at once
            os.kill(os.getpid(), self.number)


SETTINGS: list[dict[str, Any]] = [
    {},
    {"lora": True, "verifier": "spec_k", "accumulation": 3, "log_every": 2},
    {"save_every": None, "early_stopping": {"patience": 4}, "evaluate_every": 1},
]


@pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting.values())) or "plain"
)
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bytes(
    setting: dict[str, Any], pair: Path, tmp_path: Path
) -> None:
    whole = train(recipe_for(pair, tmp_path / "whole", **setting))
    stops = recipe_for(pair, tmp_path / "stops", **setting)
    for step, number, error in ((2, signal.SIGTERM, Preempted), (3, signal.SIGINT, Interrupted)):
        with pytest.raises(error, match=f"the state of step {step}"):
            train(stops, progress=StopsAt(step, number))
    result = train(stops)
    assert result.resumed_from == 3 and result.steps == whole.steps
    assert (result.before, result.after, result.skipped) == (whole.before, whole.after, whole.skipped)
    assert left(tmp_path / "whole").items() <= left(tmp_path / "stops").items()
    assert steps_of(tmp_path / "stops") == sorted(set(steps_of(tmp_path / "stops")))


@pytest.fixture(scope="module")
def whole(pair: Path, tmp_path_factory: Any) -> Path:
    """A run that nothing happened to, six steps, its last two checkpoints at 4 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(recipe_for(pair, folder))
    return folder


@pytest.fixture
def broken_off(pair: Path, whole: Path, tmp_path: Path) -> Path:
    """The same run as it was when step 6 had been saved and nothing else."""
    folder = shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(folder / "student")
    (folder / "manifest.json").unlink()
    return folder


def test_a_finished_run_is_left_as_it_is(pair: Path, whole: Path) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in whole.rglob("[!.]*") if path.is_file()}

    before = times()
    result = train(recipe_for(pair, whole))
    assert result.steps == result.resumed_from == 6
    assert times() == before


def test_a_run_that_broke_off_after_its_last_step_only_finishes(
    pair: Path, whole: Path, broken_off: Path
) -> None:
    train(recipe_for(pair, broken_off))
    assert left(broken_off) == left(whole)


DAMAGE = {
    "truncated tensor": ("student.safetensors", lambda raw: raw[: len(raw) // 2]),
    "a flipped bit in the optimizer": (
        "optimizer.safetensors",
        lambda raw: raw[:-9] + bytes([raw[-9] ^ 4]) + raw[-8:],
    ),
    "empty JSON": ("ledger.json", lambda raw: b""),
    "no manifest": ("MANIFEST.json", None),
    "an extra file": ("extra.bin", lambda raw: b"1"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_named_moved_aside_and_the_one_before_used(
    what: str, pair: Path, whole: Path, broken_off: Path, caplog: Any
) -> None:
    name, change = DAMAGE[what]
    newest = broken_off / "checkpoints" / "step-00000006"
    file = newest / name
    if change is None:
        file.unlink()
    else:
        file.write_bytes(change(file.read_bytes() if file.exists() else b""))
    with pytest.raises(IntegrityError, match=name):
        train(recipe_for(pair, broken_off), resume=str(newest))
    assert newest.is_dir()
    result = train(recipe_for(pair, broken_off))
    assert result.resumed_from == 4 and left(broken_off) == left(whole)
    assert name in caplog.text and (broken_off / "checkpoints" / "invalid" / "step-00000006").is_dir()


def test_a_run_whose_checkpoints_are_all_damaged_is_refused_and_left_as_it_is(
    pair: Path, broken_off: Path, tmp_path: Path, capsys: Any
) -> None:
    for path in (broken_off / "checkpoints").iterdir():
        (path / "MANIFEST.json").unlink()
    before = {path: path.read_bytes() for path in broken_off.rglob("*") if path.is_file()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_for(pair, broken_off).model_dump(mode="json", exclude_none=True)))
    for verb in ("train", "train", "doctor"):  # a second time as well
        assert main([verb, str(recipe)]) == 5
        said = capsys.readouterr()
        assert (
            "no checkpoint of 2" in said.out + said.err
            and "another training.output_dir" in said.out + said.err
        )
    after = {path: path.read_bytes() for path in broken_off.rglob("*") if path.is_file()}
    assert {path: raw for path, raw in after.items() if path.name != ".lock"} == {
        path: raw for path, raw in before.items() if path.name != ".lock"
    }


def test_a_damaged_manifest_of_a_finished_run_is_refused(pair: Path, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "run")
    for raw in (b"", b"{}", b"[1]", (whole / "manifest.json").read_bytes()[:-40]):
        (folder / "manifest.json").write_bytes(raw)
        with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
            train(recipe_for(pair, folder))


def test_what_lies_beside_a_run_changes_nothing_of_what_is_gone_on_with(
    pair: Path, whole: Path, broken_off: Path
) -> None:
    saved = broken_off / "checkpoints"
    beside = [
        "step-00000009-copy",
        "step-99",
        "step-abc",
        "step-00000006 (2)",
        ".step-notes",
        "step-0000000\u0667",
    ]
    for name in beside:
        shutil.copytree(saved / "step-00000004", saved / name)
    (saved / "step-00000008").write_text("a file")
    (saved / "step-00000006" / ".DS_Store").write_text("")
    for name in ("notes", "student.old", "bad_batches"):
        (broken_off / name).mkdir()
    (broken_off / "checkpoint-9.txt").write_text("mine")
    result = train(recipe_for(pair, broken_off))
    assert result.resumed_from == 6
    assert {name: raw for name, raw in left(broken_off).items() if name != ".DS_Store"} == left(whole)
    assert all((saved / name).is_dir() for name in beside) and (broken_off / "notes").is_dir()


def test_a_copy_of_a_checkpoint_under_another_steps_name_is_not_gone_on_with(
    pair: Path, whole: Path, broken_off: Path, caplog: Any
) -> None:
    saved = broken_off / "checkpoints"
    shutil.copytree(saved / "step-00000004", saved / "step-00000007")
    assert train(recipe_for(pair, broken_off)).resumed_from == 6
    assert "a copy of step 4" in caplog.text and left(broken_off) == left(whole)


def test_every_flip_truncation_and_zeroed_block_of_a_checkpoint_is_detected(
    whole: Path, tmp_path: Path
) -> None:
    """300 flipped bits, 60 truncations, 60 zeroed blocks, at random places of random files."""
    folder = shutil.copytree(whole / "checkpoints" / "step-00000006", tmp_path / "step-00000006")
    files, dice = sorted(folder.iterdir()), random.Random(0)
    check(folder)
    for turn in range(420):
        file = dice.choice(files)
        raw = file.read_bytes()
        place = dice.randrange(len(raw))
        if turn < 300:
            broken = raw[:place] + bytes([raw[place] ^ 1 << dice.randrange(8)]) + raw[place + 1 :]
        elif turn < 360:
            broken = raw[:place]
        else:
            size = min(4096, len(raw) - place)
            broken = raw[:place] + bytes(size) + raw[place + size :]
            if broken == raw:  # it was zero there
                broken = raw[:place] + b"\1" + raw[place + 1 :]
        file.write_bytes(broken)
        with pytest.raises(IntegrityError):
            check(folder)
        file.write_bytes(raw)
    check(folder)


CHANGED: dict[str, dict[str, Any]] = {
    "training.learning_rate": {"learning_rate": 2e-2},
    "training.seed": {"seed": 7},
    "training.lora": {"lora": True},
    "objective.verifier.name": {"verifier": "spec_k"},
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_changed_recipe_is_refused_by_key_before_weights_load(
    key: str, pair: Path, whole: Path, no_weights: None
) -> None:
    with pytest.raises(ConfigError) as refused:
        train(recipe_for(pair, whole, **CHANGED[key]))
    told = str(refused.value)
    assert key in told and "in the run" in told and "--allow-change" in told
    assert len(told.splitlines()) <= 6


def _edited(run: Path, without: tuple[str, ...] = (), **more: Any) -> None:
    """A run folder as another version left it: its recipe without some keys, or with keys that are no more."""
    kept = {key: value for key, value in read_run(run).items() if not key.startswith(without or ("-",))}
    write_run(run, {**kept, **more})


NEWER = (
    "training.gradient_filter",
    "training.sharding",
    "objective.extras",
    "data.sources.0.policy",
    "selection",
)


def test_a_run_begun_before_a_key_was_goes_on_with_the_key_at_its_default(
    pair: Path, whole: Path, broken_off: Path, tmp_path: Path
) -> None:
    _edited(broken_off, NEWER)
    path = tmp_path / "recipe.json"
    path.write_text(recipe_for(pair, broken_off).model_dump_json(exclude_none=True))
    assert main(["doctor", str(path)]) == 0
    with pytest.raises(ConfigError, match=r"training.gradient_filter: nothing in the run, 0.5 now"):
        train(recipe_for(pair, broken_off, gradient_filter=0.5))
    assert train(recipe_for(pair, broken_off)).resumed_from == 6 and left(broken_off) == left(whole)
    _edited(broken_off, NEWER)  # a finished one is left as it is
    manifest = json.loads((broken_off / "manifest.json").read_text())
    del manifest["config"]["training"]["gradient_filter"], manifest["config"]["selection"]
    (broken_off / "manifest.json").write_text(json.dumps(manifest))
    train(recipe_for(pair, broken_off))
    assert json.loads((broken_off / "manifest.json").read_text()) == manifest


def test_a_key_of_a_run_that_is_no_more_is_named_by_doctor_and_train(
    pair: Path, broken_off: Path, tmp_path: Path, capsys: Any
) -> None:
    _edited(broken_off, **{"training.momentum": 0.5})
    path = tmp_path / "recipe.json"
    path.write_text(recipe_for(pair, broken_off).model_dump_json(exclude_none=True))
    for verb in ("doctor", "train"):
        assert main([verb, str(path)]) == 2
        told = capsys.readouterr()
        assert "training.momentum: 0.5 in the run, nothing now" in told.out + told.err
    allowed = ["training.momentum"]
    assert train(recipe_for(pair, broken_off), allow_change=allowed).resumed_from == 6


def test_a_change_allowed_by_name_goes_on(pair: Path, broken_off: Path) -> None:
    longer = recipe_for(pair, broken_off, max_steps=8, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="learning_rate"):
        train(longer, allow_change=["training.max_steps"])
    with pytest.raises(ConfigError, match="Did you mean"):
        train(longer, allow_change=["training.learning_rat"])
    result = train(longer, allow_change=["training.max_steps", "training.learning_rate"])
    assert result.resumed_from == 6 and steps_of(broken_off) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert train(longer).resumed_from == 8


def test_other_text_or_weights_behind_the_same_paths_are_refused(
    pair: Path, broken_off: Path, tmp_path: Path
) -> None:
    text = pair / "text.jsonl"
    kept = text.read_bytes()
    rows = kept.splitlines(keepends=True)
    try:
        text.write_bytes(b"".join([rows[1], rows[0], *rows[2:]]))
        with pytest.raises(ConfigError, match="text: "):
            train(recipe_for(pair, broken_off))
    finally:
        text.write_bytes(kept)
    kept_weights = shutil.copytree(pair / "teacher", tmp_path / "teacher")
    try:
        tiny_llama(9, layers=1).save_pretrained(pair / "teacher")
        with pytest.raises(ConfigError, match="teacher_weights: "):
            train(recipe_for(pair, broken_off))
    finally:
        shutil.copytree(kept_weights, pair / "teacher", dirs_exist_ok=True)
    train(recipe_for(pair, broken_off))


def test_a_checkpoint_can_be_named_and_the_later_ones_are_set_aside(
    pair: Path, whole: Path, broken_off: Path
) -> None:
    with pytest.raises(ConfigError, match="step-00000006, step-00000004"):
        train(recipe_for(pair, broken_off), resume="4")
    result = train(recipe_for(pair, broken_off), resume=str(broken_off / "checkpoints" / "step-00000004"))
    assert result.resumed_from == 4 and left(broken_off) == left(whole)
    assert (broken_off / "checkpoints" / "superseded" / "step-00000006").is_dir()


def test_never_takes_a_new_folder_only(pair: Path, whole: Path) -> None:
    with pytest.raises(ConfigError, match="holds a run"):
        train(recipe_for(pair, whole), resume="never")


def test_old_checkpoints_go_and_the_newest_stay(whole: Path) -> None:
    names = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000006"]


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(pair: Path, broken_off: Path) -> None:
    room = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    held = subprocess.Popen(
        [sys.executable, "-c", HOLDS.format(folder=str(broken_off))],
        stdout=subprocess.PIPE,
        text=True,
        env=room,
    )
    assert held.stdout is not None and held.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"in use by process {held.pid} on "):
        train(recipe_for(pair, broken_off))
    held.kill()
    held.wait()
    held.stdout.close()
    train(recipe_for(pair, broken_off))


HOLDS = """
import time
from pathlib import Path
from selectkd.training.run_lock import locked
with locked(Path({folder!r})):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_checkpoint_holds_no_pickle_and_no_secret(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (whole / "checkpoints").rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors")
        if path.suffix == ".json":
            json.loads(path.read_bytes())


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading weights is a failure."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
