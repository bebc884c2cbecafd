"""Models that see images: their families, the parts they have, and the processor that belongs to one."""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto import processing_auto as auto

from selectkd.data.vision import TokenTypes, Vision
from selectkd.errors import ConfigError
from selectkd.models.folder import read_json

PART_NAMES = ("vision_tower", "projector", "language_model")
"""What ``training.freeze`` may name."""
TOWERS = ("vision_tower", "visual", "vision_model")
PROJECTORS = ("multi_modal_projector", "connector", "merger", "deepstack_merger_list")
WRITERS = ("language_model", "text_model")
SETTINGS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files that describe a processor beside its tokenizer."""
ASIDE = (
    "processor_class",
    "_processor_class",
    "name_or_path",
    "chat_template",
    "tokenizer",
    "video_processor",
)
"""Keys of a processor's settings that no tensor and no token count rests on."""


@dataclass(frozen=True)
class Family:
    """A kind of model that sees images. token_types, nested: as of ``Vision``."""

    token_types: TokenTypes | None = None
    nested: bool = False


FAMILIES: Mapping[str, Family] = {
    "internvl": Family(),
    "qwen2_vl": Family("mm_token_type_ids"),
    "qwen2_5_vl": Family("mm_token_type_ids"),
    "qwen3_vl": Family("mm_token_type_ids"),
    "idefics3": Family(nested=True),
    "smolvlm": Family(nested=True),
    "llava": Family(),
    "llava_onevision": Family(),
    "paligemma": Family("prefix"),
    "gemma3": Family("token_type_ids"),
}
"""Model types of transformers that are read with their images, and tested."""


def sees_images(config: Any) -> bool:
    """Whether a configuration is of a model that is read with its images."""
    return getattr(config, "model_type", None) in FAMILIES


def answer_types(config: Any, ids: Tensor) -> dict[str, Tensor]:
    """The model input that makes all of ``ids`` an answer, for a model that reads its prompt in both directions."""
    family = FAMILIES.get(getattr(config, "model_type", ""))
    return (
        {"token_type_ids": torch.ones_like(ids)}
        if family is not None and family.token_types == "prefix"
        else {}
    )


def auto_class(config: Any) -> Any:
    """transformers' class that loads the model of a configuration."""
    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def parts_of(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each of ``PART_NAMES`` that a model has; a model that sees nothing has none."""
    found: dict[str, list[nn.Module]] = {}
    plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not sees_images(plain.config):
        return found
    towers = [
        getattr(plain.model, name)
        for name in TOWERS
        if isinstance(getattr(plain.model, name, None), nn.Module)
    ]
    places = [plain.model, *towers]
    projectors = [getattr(place, name) for place in places for name in PROJECTORS if hasattr(place, name)]
    within = {id(module) for one in projectors for module in one.modules()}
    inside = [m for tower in towers for m in tower.children() if id(m) not in within]
    own = [p for tower in towers for p in tower.parameters(recurse=False)]
    found["vision_tower"] = [*inside, *([nn.ParameterList(own)] if own else [])]
    found["projector"] = projectors
    found["language_model"] = [getattr(plain.model, n) for n in WRITERS if hasattr(plain.model, n)]
    head = plain.get_output_embeddings()
    found["language_model"] += [head] if head is not None else []
    return found


def freeze(model: nn.Module, names: list[str]) -> int:
    """Stops training the parts of a model that sees images; how many weights that are.

    ConfigError for a model without such parts.
    """
    parts, count = parts_of(model), 0
    for name in names:
        if name not in parts:
            raise ConfigError(
                f"training.freeze names {name}, and {type(model).__name__} has no such part: it sees no images. Leave "
                "training.freeze out."
            )
        for module in parts[name]:
            for parameter in module.parameters():
                count += parameter.numel()
                parameter.requires_grad_(False)
    return count


def text_layers(model: nn.Module) -> set[str]:
    """The full names of the modules of a model's language model; empty for a model that sees nothing."""
    writers = {id(m) for one in parts_of(model).get("language_model", []) for m in one.modules()}
    return {name for name, module in model.named_modules() if id(module) in writers}


def vision_of(folder: Path) -> Vision | None:
    """The processor of a model folder; None for a model that sees nothing, and for a folder without any processor,
    whose model reads text alone.

    Videos are left out, whose processors need torchvision. ConfigError where the folder's files make no processor.
    """
    if not any((folder / name).is_file() for name in SETTINGS):
        return None  # so that the folder of a tokenizer alone needs no configuration
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not sees_images(config):
        return None
    return _vision_of(str(folder.resolve()), _stamp(folder))


@lru_cache(maxsize=8)
def _vision_of(folder: str, stamp: str) -> Vision:
    place = Path(folder)
    config = AutoConfig.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    family = FAMILIES[config.model_type]
    processor = _processor(place, config.model_type)
    return Vision(
        processor,
        settings_of(processor),
        family.token_types,
        family.nested,
        folder,
        (_vision_of, (folder, stamp)),
    )


def _stamp(folder: Path) -> str:
    """What changes when the files of a processor do."""
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".jinja", ".model", ".txt")]
    return " ".join(f"{path.name}:{path.stat().st_mtime_ns}:{path.stat().st_size}" for path in sorted(files))


def _processor(folder: Path, model_type: str) -> Any:
    named = next((c for f in SETTINGS if (c := _class_in(folder / f)) is not None), None)
    mapping: Any = vars(auto)["PROCESSOR_MAPPING_NAMES"]
    known = auto.processor_class_from_name(named or mapping[model_type])
    if known is None:
        raise ConfigError(
            f"{folder} names the processor {named}, which transformers does not know. Check its files."
        )
    try:
        return without_video(known).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders run each processor's own code on numbers of a file
        raise ConfigError(
            f"{folder} has no processor that can be read: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def _class_in(path: Path) -> str | None:
    name = _read(path).get("processor_class")
    return name if isinstance(name, str) else None


def without_video(kind: Any) -> Any:
    """A processor's class without its part for videos, which no recipe has and which needs torchvision."""

    def attributes(cls: Any) -> list[str]:
        return [name for name in super(reduced, cls).get_attributes() if name != "video_processor"]

    def arguments(cls: Any, *given: Any, **named: Any) -> list[Any]:
        parts = super(reduced, cls)._get_arguments_from_pretrained(*given, **named)
        names = kind.get_attributes()
        return [*parts, None] if names[-1:] == ["video_processor"] else parts

    own = {"get_attributes": attributes, "_get_arguments_from_pretrained": arguments}
    reduced: Any = type(kind.__name__, (kind,), {name: classmethod(one) for name, one in own.items()})
    return reduced


def settings_of(processor: Any) -> dict[str, Any]:
    """What a processor's tensors and token counts rest on, as plain data."""
    kinds = {"processor": type(processor).__name__, "images": type(processor.image_processor).__name__}
    return {**_plain(processor.to_dict()), "class": kinds, "placeholder": processor.image_token}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items() if key not in ASIDE}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def save_processor(vision: Vision, tokenizer: Any, folder: Path) -> None:
    """Writes a processor's settings beside a model, with the settings for videos that its own folder has."""
    processor = copy.copy(vision.processor)
    processor.tokenizer, processor.chat_template = tokenizer, getattr(tokenizer, "chat_template", None)
    processor.save_pretrained(folder)
    source = Path(vision.folder or "")
    video = _read(source / SETTINGS[0]).get("video_processor")
    if video is not None:
        path = folder / SETTINGS[0]
        path.write_text(json.dumps({**read_json(path), "video_processor": video}, indent=2) + "\n", "utf-8")
    if (source / SETTINGS[2]).is_file():
        shutil.copyfile(source / SETTINGS[2], folder / SETTINGS[2])


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
