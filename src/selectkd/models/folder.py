"""A model folder, read without a weight: its configuration, and the names and shapes of its tensors.

A folder comes from elsewhere: nothing in it may run, unpickle, or send a loader to fetch code.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectkd.errors import ConfigError, IntegrityError
from selectkd.models.attention import check_named

PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
CONFIGURATIONS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "processor_config.json",
    "preprocessor_config.json", "special_tokens_map.json",
)  # fmt: skip
LOADERS = ("auto_map", "custom_generate", "kernel_config", "fusion_config", "transformers_weights")
"""Keys that send transformers to code, kernels or weights of a configuration's choice."""
ELSEWHERE = re.compile(r"^(hf[-_]hub|local[-_]dir|https?|ftp|s3|gs|file):", re.IGNORECASE)
"""Values by which an image library is sent to the hub for a part of a model."""
LINKS = frozenset({"architecture", "backbone"})

QUANTIZED = {"bitsandbytes": "bitsandbytes", "gptq": "gptqmodel", "awq": "gptqmodel",
             "compressed-tensors": "compressed_tensors"}  # fmt: skip
"""How a folder's weights may be stored, and the package that reads them."""


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file by its header: dtype in the format's own words (F32, BF16, ...)."""

    dtype: str
    shape: tuple[int, ...]


def configuration(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    ConfigError if it is missing, and where any configuration file asks for code, kernels, or files from elsewhere.
    """
    path = folder / "config.json"
    if not path.is_file():
        alone = (folder / "adapter_config.json").is_file()
        raise ConfigError(
            f"{folder} holds an adapter without its model. Merge it into the model (peft: merge_and_unload), and name "
            "the folder that save_pretrained then writes."
            if alone
            else f"{folder} has no config.json, so it is no model folder. Name one saved by save_pretrained."
        )
    for name in CONFIGURATIONS:
        if (folder / name).is_file():
            refuse_code(read_json(folder / name), folder / name)
    config = read_json(path)
    check_named(config, path)
    _check_stored_as(config, path)
    return config


def refuse_code(content: dict[str, Any], path: Path) -> None:
    """ConfigError where a configuration, at any depth, would have something loaded that runs."""
    for key, value in entries(content):
        if value in (None, False, {}, []):
            continue
        if key == "auto_map":
            raise ConfigError(
                f"{path} asks to run the model's own code (auto_map); selectkd never does. "
                "Use a model whose architecture is part of transformers."
            )
        if key in LOADERS:
            raise ConfigError(
                f"{path} has {key}, which loads code by its name, and selectkd never does that. Remove the key."
            )
        if key in LINKS and isinstance(value, str) and ELSEWHERE.match(value):
            raise ConfigError(
                f"{path}: {key} = {value[:80]!r} would be fetched from elsewhere. Remove the key."
            )


def check_folder(folder: Path) -> None:
    """Refuse a folder that would run code or unpickle, and damaged safetensors headers; reads no weight."""
    config = configuration(folder)
    if not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{folder / 'config.json'} has no model_type. Save the model with save_pretrained.")
    names = sorted(path.name for path in folder.iterdir())
    if "adapter_config.json" in names:
        raise ConfigError(
            f"{folder} holds a whole model and an adapter (adapter_config.json) beside it. Merge the adapter (peft: "
            "merge_and_unload), or move its files out."
        )
    shards = [name for name in names if name.endswith(".safetensors") and not name.startswith("adapter")]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = sorted(set(_weight_map(index).values()))
        missing = [name for name in wanted if name not in shards]
        if missing:
            raise IntegrityError(
                f"{index} names {missing[0]!r}, which is not in {folder}. Download the model again."
            )
    if not shards:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise ConfigError(
                f"{folder} has only pickled weights ({pickles[0]}), and a pickle can run code. "
                "Convert the model to safetensors: save_pretrained writes them."
            )
        raise ConfigError(
            f"{folder} has no weights. A model folder needs .safetensors files beside config.json."
        )
    for name in shards:
        headers(folder / name)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that are loaded: those of the index where there is one, else model.safetensors."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        return [folder / name for name in sorted(set(_weight_map(index).values()))]
    raise ConfigError(
        f"{folder} has safetensors files, but neither model.safetensors nor model.safetensors.index.json, which name "
        "those of the model. Save the model with save_pretrained."
    )


def headers(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file, no byte of them read; IntegrityError where the file is not sound."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:  # checks header size, bounds and overlaps
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, not a mapping
            return {name: Stored(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise IntegrityError(
            f"{path} is not a sound safetensors file: {error}. Download it again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; ConfigError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Download the model again.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, not an object. Download the model again."
        )
    return content


def _check_stored_as(config: dict[str, Any], path: Path) -> None:
    """ConfigError for quantised weights that selectkd cannot read, or whose package is missing."""
    section = config.get("quantization_config")
    if section is None:
        return
    method = section.get("quant_method") if isinstance(section, dict) else None
    package = QUANTIZED.get(method) if isinstance(method, str) else None
    if package is None:
        raise ConfigError(
            f"{path}: weights quantised as {method!r} are not read here, only {', '.join(QUANTIZED)}. "
            "Save the model in bfloat16 or float32."
        )
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{path}: weights quantised as {method!r} need another package. Install it (pip install "
            f"{package.replace('_', '-')}), or save the model in bfloat16 or float32."
        )


def _weight_map(index: Path) -> dict[str, str]:
    """weight_map of an index; ConfigError where it is no mapping of names to files of the same folder."""
    files = read_json(index).get("weight_map", {})
    wrong = not isinstance(files, dict) or [
        name for name in files.values() if not isinstance(name, str) or Path(name).name != name
    ]
    if wrong:
        raise ConfigError(f"{index}: weight_map must name files of its own folder. Download the model again.")
    return files


def entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every (key, value) of an object and of all inside it."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from one.items()
            waiting.extend(one.values())
        elif isinstance(one, list):
            waiting.extend(one)
