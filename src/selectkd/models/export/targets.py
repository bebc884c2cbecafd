"""The table of targets: how each is written and read back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectkd.models.export import draft, folders, onnx
from selectkd.models.export.exported import Exported
from selectkd.models.export.student import Options, Student
from selectkd.models.load import Loaded


@dataclass(frozen=True)
class Target:
    """write: (student, new folder, options) -> what the report says beside the figures. read: the way back.

    check: for what is missing on this machine, before weights load. ``kinds.KINDS`` has the number formats.
    """

    write: Callable[[Student, Path, Options], dict[str, Any]]
    read: Callable[[Path, Student, Options], Exported]
    check: Callable[[], None] = lambda: None


def write_gguf(student: Student, folder: Path, options: Options) -> dict[str, Any]:
    """``NAME-TYPE.gguf`` and a Modelfile for Ollama."""
    from selectkd.models.export.gguf.file import write_gguf as write
    from selectkd.models.export.ollama import modelfile

    model, texts = student.model, options.calibration
    if texts:
        from selectkd.models.export.gguf.calibrated import calibrated

        model = calibrated(model, texts, options.kind)
    file = _file(student, options)
    vocabulary, formats = write(
        model, student.tokenizer, folder / file, kind=options.kind, ends=student.ends, name=student.name
    )
    text, notes = modelfile(file, student.tokenizer, model.config.max_position_embeddings)
    (folder / "Modelfile").write_text(text, encoding="utf-8")
    return {
        "file": file,
        "tensors": formats,
        "calibration": {"texts": len(texts), "tokens": sum(map(len, texts))} if texts else None,
        "pre_tokenizer": vocabulary.pre,
        "special_ids": vocabulary.special,
        "notes": [*vocabulary.notes, *(f"Ollama: {note}" for note in notes)],
    }


def read_gguf(folder: Path, student: Student, options: Options) -> Exported:
    """The file, taken back to fp32."""
    from selectkd.models.export.gguf.reading import read_gguf as read

    loaded = Loaded(student.model, student.tokenizer, student.source, None)
    return read(folder / _file(student, options), loaded)


def _file(student: Student, options: Options) -> str:
    return f"{student.name}-{options.kind}.gguf"


TARGETS: dict[str, Target] = {
    "hf": Target(folders.write_folder, folders.read_folder),
    "merged": Target(folders.write_folder, folders.read_folder),
    "adapter": Target(folders.write_adapter, folders.read_adapter),
    "gguf": Target(write_gguf, read_gguf),
    "vllm-draft": Target(draft.write_vllm, folders.read_folder),
    "sglang-draft": Target(draft.write_sglang, folders.read_folder),
    "onnx": Target(onnx.write_onnx, onnx.read_onnx, onnx.check_packages),
    "mlx": Target(folders.write_folder, folders.read_folder),
}
