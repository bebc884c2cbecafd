"""A student written as a Hugging Face model folder, whole or not at all."""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
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
from selectkd.data.vision import Vision
from selectkd.errors import ConfigError
from selectkd.models.fake_quantized import integers, rounded, rounded_layers
from selectkd.models.load import DTYPES
from selectkd.models.lora import merge
from selectkd.models.quantized import dequantized, is_quantized
from selectkd.models.sharded import is_sharded, plain_copy
from selectkd.models.vision import save_processor


def save_student(
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike[str],
    card: str,
    *,
    dtype: str | None = None,
    vision: Vision | None = None,
) -> Path:
    """Write weights (safetensors), configuration, tokenizer, chat template, processor and README.md (= card).

    vision: the processor of a model that sees images.
    from_pretrained(folder) of AutoModelForCausalLM, or of AutoModelForImageTextToText, gives the same model back.
    Everything is written beside the folder first and renamed when complete; a model folder that stood there is
    replaced. An adapter is merged in a copy, so the model in memory goes on training. dtype: fp32 weights are written
    as this, default as they are. A sharded model is put together first, a collective call, and rank 0 alone writes. A
    base in 4 bits is written whole, adapters merged; weights that are rounded as they train are written rounded, in
    fp32 whatever dtype is. ConfigError where ``folder`` is a file or holds anything but a model, ResourceError where
    the disk is full.
    """
    folder = Path(folder)
    check_target(folder)
    if is_sharded(model):
        model = plain_copy(model)
        if model is None:
            return folder
    elif is_quantized(model):
        model = dequantized(model, DTYPES[dtype or "float32"])
    elif rounded_layers(model):
        model, dtype = rounded(model), None
    elif hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model)
    model = merge(model)

    def write(partial: Path) -> None:
        _save_weights(model, partial, dtype)
        tokenizer.save_pretrained(partial)
        if vision is not None:
            save_processor(vision, tokenizer, partial)
        fault_point("student")
        (partial / "README.md").write_text(card, encoding="utf-8")

    return _written(folder, write, _bytes_of(model))


def save_integers(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> Path:
    """Write a model that rounds its weights as torchao does with its integers and scales, which transformers reads.

    As of ``save_student`` it is whole or not there. Raises as ``fake_quantized.integers``.
    """
    folder = Path(folder)
    check_target(folder)
    found = integers(model)

    def write(partial: Path) -> None:
        found.save_pretrained(partial)
        tokenizer.save_pretrained(partial)

    return _written(folder, write, _bytes_of(model))


def _written(folder: Path, write: Callable[[Path], None], needed: int) -> Path:
    """The folder as ``write`` fills it, whole or as it was; needed: bytes, for the error of a full disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    clear_left(folder)
    try:
        partial.mkdir()
        write(partial)
        sync_folder(partial)
        replace_folder(partial, folder)
    except OSError as error:
        raise disk_error(error, folder, needed=needed) from error
    except SafetensorError as error:  # how safetensors says that the disk is full
        raise disk_error(os_error_of(error), folder, needed=needed) from error
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
