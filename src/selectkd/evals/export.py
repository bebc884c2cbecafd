"""Exports a student: writes it aside, reads it back, measures it, and publishes it or refuses."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from selectkd.data.durable import clear_left, disk_error, json_bytes, os_error_of, replace_folder, sync_folder
from selectkd.errors import ConfigError, IntegrityError
from selectkd.evals.exported import (
    BOUNDS,
    Answers,
    Drafted,
    Fidelity,
    answers_of,
    drafted,
    drafted_after,
    fidelity,
    timed_target,
)
from selectkd.models.export.draft import check_pair
from selectkd.models.export.student import Options, Student
from selectkd.models.export.targets import Target
from selectkd.models.head import head_of
from selectkd.models.load import file_sha256
from selectkd.training.record.manifest import versions

REPORT = "export-report.json"


@dataclass(frozen=True)
class Texts:
    """What an export is measured on. prompts: ids; written: the same as text, for the ids. tokens: of an answer."""

    prompts: list[list[int]]
    written: list[str]
    tokens: int
    source: str


@dataclass(frozen=True)
class Report:
    """What came of an export: its folder, the figures, what the target noted, acceptance as a draft."""

    folder: Path
    fidelity: Fidelity
    drafted: Drafted | None
    content: dict[str, Any]


def export(
    student: Student,
    target: Target,
    options: Options,
    texts: Texts,
    *,
    about: dict[str, Any],
    bound: float | None = None,
    stage: Callable[[str], None] = lambda _: None,
) -> Report:
    """The student at ``options.folder``, with export-report.json beside its files, once it is measured.

    about: where the student comes from, for the report. bound: the KL above which it is refused, None as of ``BOUNDS``.
    IntegrityError where ids, ends, template, settings or KL are not the student's: nothing is left at the folder then.
    ConfigError for what the target has no place for, ResourceError for a full disk.
    """
    bound = BOUNDS[options.kind] if bound is None else bound
    _check(student, options)
    stage("the student's own answers")
    answers = answers_of(student, texts.prompts, texts.tokens)
    alone, before = None, None
    if options.target is not None:
        stage("acceptance of the student's drafts")
        alone = timed_target(student, options.target, texts.prompts, texts.tokens)
        before = drafted(student, options.target, texts.prompts, alone, options.draft_length)
        options = options.with_length(before.draft_length)
    folder = options.folder
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    clear_left(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
        stage("writing")
        notes = target.write(student, partial, options)
        stage("reading it back")
        exported = target.read(partial, student, options)
        found = fidelity(student, exported, answers, texts.written)
        failures = found.failures(bound)
        if failures:
            raise IntegrityError(
                f"the export is not true to its student: {'; '.join(failures)}. Nothing was left at {folder}."
            )
        if before is not None and options.target is not None and alone is not None:
            before = drafted_after(before, exported, options.target, texts.prompts, alone)
        content = {
            **about, "type": options.kind, "read_back_by": exported.read_by, "bound": bound,
            "fidelity": found.as_dict(), "draft": _draft(before), "notes": notes, "texts": _texts(texts, answers),
            "versions": versions(), "files": _files(partial),
        }  # fmt: skip
        (partial / REPORT).write_bytes(json_bytes(content))
        sync_folder(partial)
        replace_folder(partial, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise disk_error(os_error_of(error), folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Report(folder, found, before, content)


def _check(student: Student, options: Options) -> None:
    """ConfigError for weights that are no numbers, ends that are no tokens, and a target that it cannot draft for."""
    if options.target is not None:
        check_pair(student, options)
    broken = next((name for name, one in student.model.named_parameters() if not one.isfinite().all()), None)
    if broken is not None:
        raise ConfigError(
            f"{student.source}: the weight {broken} has NaN or infinity, so the model computes nothing. Export an "
            "earlier checkpoint."
        )
    width = head_of(student.model).width
    wrong = sorted(i for i in student.ends if not 0 <= i < width)
    if wrong:
        raise ConfigError(
            f"{student.source}: generation_config.json or the tokenizer ends texts at id {wrong[0]}, and the head has "
            f"{width} rows. Correct eos_token_id there."
        )


def check_out(folder: Path, *read: str | None) -> None:
    """ConfigError unless ``folder`` is free, empty, or an export that may be replaced, and none of what is ``read``."""
    same = next((one for one in read if one is not None and Path(one).resolve() == folder.resolve()), None)
    if same is not None:
        raise ConfigError(
            f"--out {folder} would replace {same}, which the export is made of. Name another folder."
        )
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Name a folder for the export.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / REPORT).is_file():
        raise ConfigError(f"{folder} holds files that are no export. Name a new or empty folder.")


def _draft(found: Drafted | None) -> dict[str, Any] | None:
    return None if found is None else asdict(found)


def _texts(texts: Texts, answers: Answers) -> dict[str, Any]:
    ids = repr((texts.prompts, answers.answers)).encode()
    return {"source": texts.source, "prompts": len(texts.prompts), "tokens": texts.tokens,
            "sha256": hashlib.sha256(ids).hexdigest()}  # fmt: skip


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha-256 of each file of an export."""
    paths: Sequence[Path] = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in paths
    }
