# ruff: noqa: E501
"""``selectkd eval --suite vision`` with models that see images, through their own processors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.vision.test_questions import PET, png, table, text64
from selectkd.cli import main
from selectkd.evals.asking import Decoding
from selectkd.evals.vision import scenes, synthetic
from selectkd.evals.vision.model import VisionModel
from vision import tiny


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.saved("internvl", tmp_path_factory.mktemp("internvl"), seed=1, layers=2)


def test_the_verb_asks_scenes_and_benchmarks_and_goes_on_from_its_memory(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "TASKS", {"bars": scenes.TASKS["bars"]})  # one of five: 36 questions
    (tmp_path / "data").mkdir()
    table(
        tmp_path / "data" / "MMStar.tsv",
        [{"index": at, "image": text64(at), "answer": "B", **PET} for at in range(3)],
    )
    command = [
        "eval", str(model_folder), "--suite", "vision", "--tasks", "mmstar,synthetic", "--data", str(tmp_path / "data"),
        "--limit", "2", "--tokens", "1", "--size", "64", "--batch-size", "12", "--memory", str(tmp_path / "memory.jsonl"), "--device", "cpu",
    ]  # fmt: skip
    found = []
    for run in ("a", "b"):
        assert main([*command, "--json", str(tmp_path / f"{run}.json")]) == 0
        found.append(json.loads((tmp_path / f"{run}.json").read_text())["rows"])
    assert found[0] == found[1] and len(found[0]) == 1 + 12
    assert {row["task"] for row in found[0]} >= {"mmstar", "bars", "bars (blank)", "bars (shuffled)"}
    assert {row["settings"]["size"] for row in found[0] if row["task"] != "mmstar"} == {64}
    written = (tmp_path / "memory.jsonl").read_text().count("\n")
    assert written and "all_rotations" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--tasks", "mmstra"], "mmstar"),
        (["--tasks", "mmstar"], "--data"),
        (["--tasks", "mmvet", "--data", "."], "--judge"),
        (["--tasks", "mmstar", "--data", "nowhere"], "is no folder"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_before_a_model_loads(
    flags: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["eval", "no-such-model", "--suite", "vision", "--memory", str(tmp_path / "m.jsonl"), *flags])
        == 2
    )
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2_5_vl", "paligemma"])
def test_an_answer_is_that_to_its_own_image_whatever_stands_in_the_batch(family: str, tmp_path: Path) -> None:
    folder = tiny.saved(family, tmp_path / family, seed=1, layers=2)
    model = VisionModel.of(folder, Decoding(4), dtype="float32")

    def chat(*shades: int) -> list[dict[str, Any]]:
        images = [{"type": "image", "image": png(shade)} for shade in shades]
        return [{"role": "user", "content": [*images, {"type": "text", "text": "Which?"}]}]

    ids, images = model.prompt(chat(10, 200))
    assert len(images.refs) == 2 and images.prefix == len(ids)
    assert all(set(ids[begin:end]) & model.vision.image_ids for begin, end in images.places)
    chats = [chat(10), chat(10, 200), chat(200)]
    together = model(chats)
    assert together == [model([one])[0] for one in chats]
