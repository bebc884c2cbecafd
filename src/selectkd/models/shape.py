"""A model without its weights: built from its configuration, compared with the names and shapes that a file holds."""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig
from transformers.utils import logging

from selectkd.errors import ConfigError, IntegrityError, ResourceError, SelectKDError
from selectkd.models.folder import Stored, configuration, entries, headers, weight_files
from selectkd.models.vision import auto_class

FLOATS = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
}  # fmt: skip
COUNTS = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
UPSTREAM_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError, SafetensorError, StrictDataclassError,
)  # fmt: skip
"""Errors that transformers' own code raises for numbers that do not fit together."""
SHOWN = 3


def config_of(folder: Path) -> Any:
    """The configuration of a model folder as transformers reads it.

    ConfigError with transformers' own reason for a model type it does not know, and for values that cannot be.
    """
    configuration(folder)
    with refused(folder):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def shape_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The causal language model of a folder's configuration, every tensor on the meta device; with its vision tower
    where it is of ``models.vision.FAMILIES``.

    ConfigError for a model that is none (encoder-decoders, others that see images) and for sizes that do not fit.
    """
    config = config_of(folder)
    config._attn_implementation = None  # no shape depends on it
    with refused(folder), torch.device("meta"):
        return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)


def check_weights(folder: Path) -> None:
    """IntegrityError unless a folder's safetensors files hold the model its configuration describes, by their headers.

    transformers' own loader runs on tensors without data, so that names it renames, stacks or ties are taken as it
    takes them; nothing may be missing, of another shape or dtype, or left over. Quantised weights are not looked at.
    """
    config = configuration(folder)
    if config.get("quantization_config") is not None:
        return
    stored = {name: one for path in weight_files(folder) for name, one in headers(path).items()}
    _check_layers(config, len(stored), folder)
    _check_tensors(_Described(json.dumps(config, sort_keys=True), tuple(sorted(stored.items())), folder))


@dataclass(frozen=True)
class _Described:
    """What the check of a folder rests on: configuration and headers, wherever the folder is."""

    config: str
    stored: tuple[tuple[str, Stored], ...]
    folder: Path = field(compare=False)


@lru_cache(maxsize=16)
def _check_tensors(described: _Described) -> None:
    """A run asks before its checks and again when it loads; what was sound is not built anew. Errors are not kept."""
    folder, stored = described.folder, dict(described.stored)
    shape = shape_of(folder)
    empty = {name: _empty(name, one, folder) for name, one in stored.items()}
    with refused(folder), without_reports():
        _, found = type(shape).from_pretrained(
            None,
            config=shape.config,
            state_dict=empty,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    check_found(found, folder)
    numbers = [name for name, one in empty.items() if not one.is_floating_point()]
    wrong = [name for name in numbers if name in dict(shape.named_parameters())]
    if wrong:
        raise IntegrityError(
            f"{folder}: {wrong[0]} is stored as {stored[wrong[0]].dtype}, which needs the scales of a "
            "quantization_config, and config.json has none. Save the model in bfloat16 or float32."
        )


def check_found(found: Mapping[str, Any], folder: Path | str) -> None:
    """IntegrityError where a loader made up a tensor, left one out or could not convert it; ``found`` is its report."""
    faults = []
    for key, words in (("missing_keys", "not in the file"), ("unexpected_keys", "not of the model")):
        if names := sorted(found.get(key) or ()):
            faults.append(f"{len(names)} {words} ({_some(names)})")
    shapes: list[Any] = sorted(found.get("mismatched_keys") or ())
    if shapes:
        name, file, model = shapes[0]
        faults.append(
            f"{len(shapes)} of another shape ({name}: {tuple(file)} in the file, {tuple(model)} by config.json)"
        )
    if failed := found.get("conversion_errors"):
        faults.append(f"{len(failed)} that could not be put together ({_some(sorted(map(str, failed)))})")
    if faults:
        raise IntegrityError(
            f"{folder} does not hold the tensors of the model that config.json describes: {'; '.join(faults)}. "
            "Missing ones would be random numbers. Save the model again with save_pretrained, out of any wrapper."
        )


@contextlib.contextmanager
def refused(folder: Path | str) -> Iterator[None]:
    """What transformers raises of a folder, as a ConfigError with the first lines of its reason.

    Its loaders run an architecture's own code on numbers from a file, which ends in any class of error.
    """
    try:
        yield
    except SelectKDError:
        raise
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise ResourceError(f"the model {folder} does not fit into memory: {_reason(error)}") from error
    except UPSTREAM_ERRORS as error:
        raise ConfigError(
            f"transformers cannot make a causal language model of {folder}: {_reason(error)}"
        ) from error


@contextlib.contextmanager
def without_reports() -> Iterator[None]:
    """No progress bars and no reports of transformers; ``check_found`` reads their content."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_layers(config: dict[str, Any], tensors: int, folder: Path) -> None:
    """IntegrityError for more layers than there are tensors: building them one by one could take for ever."""
    for key, value in entries(config):
        if key in LAYER_COUNTS and isinstance(value, int) and value > tensors:
            raise IntegrityError(
                f"{folder}: config.json says {key} = {value:,}, and the files hold {tensors:,} tensors in all. "
                "Download the model again."
            )


def _empty(name: str, stored: Stored, folder: Path) -> Tensor:
    dtype = (FLOATS | COUNTS).get(stored.dtype)
    if dtype is None:
        raise IntegrityError(
            f"{folder}: {name} is stored as {stored.dtype}, which needs the scales of a quantization_config, and "
            "config.json has none. Save the model in bfloat16 or float32."
        )
    return torch.empty(stored.shape, dtype=dtype, device="meta")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def _reason(error: BaseException) -> str:
    """The first three lines that say something, at most 400 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:3])[:400]
