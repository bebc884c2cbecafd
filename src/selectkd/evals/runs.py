"""The students of a run folder: the one it left, and the one it began with."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from selectkd.errors import ConfigError, IntegrityError
from selectkd.models.cut import cut_student
from selectkd.models.load import Loaded, load_model


def load_student(
    spec: str | os.PathLike[str], *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> Loaded:
    """The student of a run folder, or the model behind any other spec that ``load_model`` knows."""
    folder = Path(spec).expanduser()
    if (folder / "metrics.jsonl").is_file():
        if not (folder / "student").is_dir():
            raise ConfigError(f"the run {spec} has left no student. Finish it, or name a model folder.")
        return load_model(folder / "student", dtype=dtype).on(device)
    return load_model(spec, dtype=dtype).on(device)


def load_student_before(
    run: str | os.PathLike[str], *, dtype: str = "float32", device: torch.device | str = "cpu"
) -> Loaded:
    """The student a finished run began with: loaded again, or cut again from its teacher at the same layers.

    ConfigError where the folder is no finished run.
    """
    manifest = read_manifest(run)
    recipe = manifest["config"]
    named = recipe["student"].get("model")
    if named is not None:
        return load_model(named, dtype=dtype, revision=recipe["student"].get("revision")).on(device)
    teacher = recipe["teacher"]
    if not isinstance(teacher, dict) or teacher.get("model") is None:
        raise ConfigError(f"the run {run} cut its student from a teacher that it does not name alone.")
    loaded = load_model(teacher["model"], dtype=dtype, revision=teacher.get("revision"))
    wanted, kept = recipe["student"]["from_teacher"], (manifest["student"].get("cut") or {}).get("kept")
    student, layers, _ = cut_student(loaded.model, wanted["layers"], kept or wanted["choose"], None)
    source = f"{loaded.source} with layers {', '.join(map(str, layers))}"
    return Loaded(student.eval(), loaded.tokenizer, source, loaded.revision).on(device)


def read_manifest(run: str | os.PathLike[str]) -> dict[str, Any]:
    """A run's manifest.json; ConfigError where there is none, IntegrityError where it is not whole."""
    path = Path(run).expanduser() / "manifest.json"
    if not path.is_file():
        raise ConfigError(f"{run} has no manifest.json, so it is no finished run. Name a run's output_dir.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise IntegrityError(
            f"{path} is not valid JSON: {error}. The run's other files are not harmed."
        ) from error
