"""A student written as a Hugging Face model folder, whole or not at all."""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from selectkd.data.durable import (
    clear_left,
    disk_error,
    fault_point,
    os_error_of,
    replace_folder,
    sync_folder,
)
from selectkd.errors import ConfigError
from selectkd.models.load import DTYPES
from selectkd.models.lora import merge
from selectkd.models.sharded import is_sharded, plain_copy


def save_student(
    model: Any, tokenizer: Any, folder: str | os.PathLike[str], card: str, *, dtype: str | None = None
) -> Path:
    """Write weights (safetensors), configuration, tokenizer, chat template and README.md (= card).

    AutoModelForCausalLM.from_pretrained(folder) gives the same model back. Everything is written beside the
    folder first and renamed when complete; a model folder that stood there is replaced. An adapter is merged
    in a copy, so the model in memory goes on training. dtype: fp32 weights are written as this, default as they are.
    A sharded model is put together first, a collective call, and rank 0 alone writes. ConfigError where ``folder`` is a
    file or holds
    anything but a model, ResourceError where the disk is full.
    """
    folder = Path(folder)
    check_target(folder)
    if is_sharded(model):
        model = plain_copy(model)
        if model is None:
            return folder
    elif hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    clear_left(folder)
    try:
        model = merge(model)
        partial.mkdir()
        _save_weights(model, partial, dtype)
        tokenizer.save_pretrained(partial)
        fault_point("student")
        (partial / "README.md").write_text(card, encoding="utf-8")
        sync_folder(partial)
        replace_folder(partial, folder)
    except OSError as error:
        raise disk_error(error, folder, needed=_bytes_of(model)) from error
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise disk_error(os_error_of(error), folder, needed=_bytes_of(model)) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _bytes_of(model: Any) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _save_weights(model: Any, folder: Path, dtype: str | None) -> None:
    """``save_pretrained`` with the fp32 weights in another dtype, each tensor that is tied to others once."""
    state = model.state_dict()
    if dtype is None or all(tensor.dtype != torch.float32 for tensor in state.values()):
        model.save_pretrained(folder)
        return
    wanted, once = DTYPES[dtype], {}
    for name, tensor in state.items():
        if tensor.dtype == torch.float32 and wanted != torch.float32:
            state[name] = once.setdefault((tensor.data_ptr(), tensor.shape), tensor.to(wanted))
    model.save_pretrained(folder, state_dict=state)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["dtype"] = dtype  # of the file; save_pretrained writes the dtype in memory
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def check_target(folder: Path) -> None:
    """ConfigError unless ``folder`` is free, empty, or a model folder that may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file. Name a folder for the model.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ConfigError(f"{folder} holds files that do not belong to a model. Name a new or empty folder.")
