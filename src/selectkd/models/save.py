"""A student written as a Hugging Face model folder, whole or not at all."""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import copy
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from selectkd.durable import disk_error, os_error_of, replace_folder, sync_folder
from selectkd.errors import ConfigError
from selectkd.models.lora import merge


def save_student(model: Any, tokenizer: Any, folder: str | os.PathLike[str], card: str) -> Path:
    """Write weights (safetensors), configuration, tokenizer, chat template and README.md (= card).

    AutoModelForCausalLM.from_pretrained(folder) gives the same model back. Everything is written beside the
    folder first and renamed when complete; a model folder that stood there is replaced. An adapter is merged
    in a copy, so the model in memory goes on training. ConfigError where ``folder`` is a file or holds
    anything but a model, ResourceError where the disk is full.
    """
    folder = Path(folder)
    check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    if hasattr(model, "merge_and_unload"):
        model = merge(copy.deepcopy(model))
    try:
        partial.mkdir()
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(card, encoding="utf-8")
        sync_folder(partial)
        replace_folder(partial, folder)
    except OSError as error:
        raise disk_error(error, folder) from error
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise disk_error(os_error_of(error), folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def check_target(folder: Path) -> None:
    """ConfigError unless ``folder`` is free, empty, or a model folder that may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Name a folder for the model.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds files that are no model. Name a new or an empty folder.")
