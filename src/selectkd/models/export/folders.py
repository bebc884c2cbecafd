"""Model folders: as the student is, in another number format, or its adapter alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from selectkd.errors import ConfigError
from selectkd.models.export.exported import Exported, encoder, model_logits, template_of
from selectkd.models.export.student import Options, Student
from selectkd.models.load import load_model

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def write_folder(student: Student, folder: Path, options: Options) -> dict[str, Any]:
    """A folder of ``save_pretrained`` in the number format of ``options``."""
    model = student.model
    with in_dtype(model, DTYPES[options.kind]):
        model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    return {}


@contextlib.contextmanager
def in_dtype(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """The model in a narrower number format while the context lasts; its fp32 weights come back afterwards.

    ConfigError where a weight is too large for the format.
    """
    kept = {name: tensor.data for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    try:
        model.to(dtype)
        if any(not parameter.isfinite().all() for parameter in model.parameters()):
            raise ConfigError(f"a weight is not finite in {dtype}. Use --type bf16 or f32.")
        yield
    finally:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = kept[name]
        model.config.dtype = torch.float32


def read_folder(folder: Path, student: Student, options: Options) -> Exported:
    """The folder as transformers loads it, computed in fp32."""
    loaded = load_model(folder)
    return Exported(
        encode=encoder(loaded.tokenizer),
        logits=model_logits(loaded.model),
        ends=student.ends_of(loaded.tokenizer, loaded.model),
        template=template_of(loaded.tokenizer),
        read_by="transformers",
        model=loaded.model,
    )


def write_adapter(student: Student, folder: Path, options: Options) -> dict[str, Any]:
    """The low-rank adapter of a student in peft's format, and its tokenizer; ConfigError for one without."""
    model = student.model
    if not hasattr(model, "peft_config"):
        raise ConfigError(
            f"{student.source} was not trained with LoRA, so it has no adapter. Use --to merged."
        )
    if student.base is None:
        raise ConfigError(
            f"the adapter of {student.source} belongs to a student cut from its teacher, which has no name. "
            "Use --to merged."
        )
    for config in model.peft_config.values():
        config.base_model_name_or_path = student.base
    with in_dtype(model, DTYPES[options.kind]):
        model.save_pretrained(folder)
    student.tokenizer.save_pretrained(folder)
    return {"base": student.base}


def read_adapter(folder: Path, student: Student, options: Options) -> Exported:
    """The adapter on its base, both as peft loads them."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    assert student.base is not None
    base: Any = load_model(student.base, revision=student.base_revision).model
    model = PeftModel.from_pretrained(base, folder, is_trainable=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return Exported(
        encode=encoder(tokenizer),
        logits=model_logits(model),
        ends=student.ends_of(tokenizer, base),
        template=template_of(tokenizer),
        read_by="peft",
        model=model,
    )
