"""The students of a run folder: the one it left, and the one it began with."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from selectkd.errors import ConfigError
from selectkd.models.cut import cut_student
from selectkd.models.load import Loaded, load_model
from selectkd.models.lora import add_lora
from selectkd.training.checkpoint import read_part
from selectkd.training.checkpoint.folder import PREFIX, Found, all_in, check, name_of, newest
from selectkd.training.checkpoint.parts import Weights
from selectkd.training.record.manifest import read_manifest
from selectkd.training.run_folder import CHECKPOINTS, FINISHED, RUN, read_run


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


def load_student_at(
    run: str | os.PathLike[str], checkpoint: str | None
) -> tuple[Loaded, str, dict[str, Any]]:
    """(the student of a run's checkpoint in fp32, the checkpoint's path, the run's recipe).

    An adapter is still on it. checkpoint: a step or a path; None is the newest that is sound. ConfigError for a folder
    that is no run and a step that has no checkpoint, IntegrityError for a damaged one that was named.
    """
    folder = Path(run).expanduser()
    recipe = recipe_of(folder)
    found = _checkpoint(folder / CHECKPOINTS, checkpoint)
    kept = read_part(found.path, "origin")["kept"]
    student, teacher, lora = recipe["student"], recipe["teacher"], recipe["training"].get("lora")
    if student.get("model") is not None:
        loaded = load_model(student["model"], revision=student.get("revision"))
    else:
        loaded = load_model(teacher["model"], revision=teacher.get("revision"))
        model, layers, _ = cut_student(loaded.model, student["from_teacher"]["layers"], kept, None)
        source = f"{loaded.source} with layers {', '.join(map(str, layers))}"
        loaded = Loaded(model.eval(), loaded.tokenizer, source, loaded.revision)
    model = loaded.model.requires_grad_(True)
    if lora is not None:
        model = add_lora(model, **lora)
    Weights(model).load_state_dict(read_part(found.path, "student"))
    return Loaded(model.eval(), loaded.tokenizer, loaded.source, loaded.revision), str(found.path), recipe


def recipe_of(run: Path) -> dict[str, Any]:
    """The recipe of a run, finished or not; ConfigError for a folder that is none."""
    if (run / FINISHED).is_file():
        return read_manifest(run)["config"]
    if not (run / RUN).is_file():
        raise ConfigError(f"{run} is no run: it has neither {FINISHED} nor {RUN}. Name a run's output_dir.")
    nested: dict[str, Any] = {}
    for path, value in read_run(run).items():
        *above, last = path.split(".")
        place = nested
        for name in above:
            place = place.setdefault(name, {})
        place[last] = value
    return {key: _lists(value) for key, value in nested.items()}


def _lists(value: Any) -> Any:
    """A nest whose mappings of 0, 1, 2, ... are lists again."""
    if not isinstance(value, dict):
        return value
    inside = {key: _lists(each) for key, each in value.items()}
    numbered = list(inside) == [str(i) for i in range(len(inside))] and inside
    return list(inside.values()) if numbered else inside


def _checkpoint(folder: Path, wanted: str | None) -> Found:
    if wanted is None:
        found, _ = newest(folder)
        if found is None:
            raise ConfigError(
                f"{folder.parent} has no checkpoint yet. Train it further, or name a model folder."
            )
        return found
    path = folder / name_of(int(wanted)) if wanted.isdecimal() else Path(wanted).expanduser()
    if not path.is_dir():
        there = ", ".join(str(int(one.name.removeprefix(PREFIX))) for one in all_in(folder))
        raise ConfigError(f"--checkpoint {wanted}: the run has checkpoints of the steps {there or 'none'}.")
    return Found(path, check(path))
