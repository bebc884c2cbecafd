"""Kinds of attention that a recipe may name, all of them local, and the packages they need."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

from selectkd.errors import ConfigError

PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}
"""The package that a kind needs; without it transformers would look for a kernel on the hub."""
SUPPORTED = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flash_attention_3": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}
"""The attribute by which a model class of transformers says that it knows a kind."""
KINDS = ("eager", *SUPPORTED)
BY_SAMPLE = "selectkd_sdpa"
"""sdpa that reads the samples of a packed row one by one (``models.forward``); no recipe names it."""


def check_attention(kind: str | None, *, where: str) -> None:
    """ConfigError for a kind that is no local one, or whose package is missing; None is the model's own choice."""
    if kind is None:
        return
    if kind not in KINDS:
        raise ConfigError(
            f"{where} = {kind!r} must be one of: {', '.join(KINDS)}. A kernel of the hub is code from elsewhere, which "
            "selectkd never runs."
        )
    package = PACKAGES.get(kind)
    if package is not None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{where} = {kind!r} needs the package {package}, which is not installed. Install it, or use sdpa."
        )


def check_named(config: Mapping[str, Any], path: Path) -> None:
    """ConfigError where a config.json asks for attention, or any other part, that is not a local one."""
    for key, name in _implementations(config):
        if "/" in name or "|" in name:
            raise ConfigError(
                f"{path} asks for the kernel {name!r} ({key}), code from elsewhere, which selectkd never runs. "
                "Remove the key."
            )


def check_supported(config: Any, kind: str | None, *, where: str) -> None:
    """``check_attention``, and ConfigError where the model class of a configuration does not know ``kind``."""
    check_attention(kind, where=where)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is not None and kind in SUPPORTED and not getattr(model_class, SUPPORTED[kind], False):
        supported = [one for one in KINDS if one == "eager" or getattr(model_class, SUPPORTED[one], False)]
        raise ConfigError(
            f"{where} = {kind!r} is not known to {model_class.__name__}. Use one of: {', '.join(supported)}."
        )


def attention_options(
    folder: Path, content: Mapping[str, Any], kind: str | None, *, where: str
) -> dict[str, Any]:
    """The arguments of ``from_pretrained`` for ``kind``; without one, the kind in config.json is checked.

    content: of config.json. ConfigError for a kind that is not installed, or that the model does not know.
    """
    wanted = kind or next((name for key, name in _implementations(content) if "attn" in key), None)
    if wanted is not None:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        check_supported(
            config, wanted, where=where if kind else f"{folder / 'config.json'}: attn_implementation"
        )
    return {} if kind is None else {"attn_implementation": kind}


def kind_of(model: Any) -> str:
    """How a model computes attention: one of ``KINDS`` or ``BY_SAMPLE``."""
    return getattr(model.config.get_text_config(), "_attn_implementation", None) or "eager"


@contextmanager
def plain_attention(model: Any) -> Iterator[None]:
    """Compute attention eagerly inside, where the model's way needs a GPU or a compiler; sdpa and eager stay."""
    kind = getattr(model.config, "_attn_implementation", None)
    if kind in (None, "eager", "sdpa", BY_SAMPLE):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(kind)


def _implementations(config: Any) -> Iterator[tuple[str, str]]:
    """Every key of a configuration, at any depth, that says which implementation of a part is used, and its names."""
    if isinstance(config, list):
        for each in config:
            yield from _implementations(each)
    if not isinstance(config, Mapping):
        return
    for key, value in config.items():
        if isinstance(key, str) and "implementation" in key:
            yield from ((key, name) for name in _texts(value))
        yield from _implementations(value)


def _texts(value: Any) -> Iterator[str]:
    """The texts in a value, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(one)
