"""Recipes of older versions, brought to the keys of today.

A recipe may say ``version: N``; without it, it is of today's. ``STEPS[n]`` takes the plain values of version n to those
of n + 1, so an old recipe goes through every step between, and its errors are told in today's keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from selectkd.errors import ConfigError

VERSION = 2
"""The version of the keys in ``schema``: goes up by one where a key is renamed, goes away or means something else."""

Step = Callable[[dict[str, Any]], dict[str, Any]]


def _saves_by_itself(values: dict[str, Any]) -> dict[str, Any]:
    """0 -> 1: a recipe without ``training.save_every`` saved nothing; now it saves each ten minutes."""
    return {**values, "training": {"save_every": None, **(values.get("training") or {})}}


def _precision_was_dtype(values: dict[str, Any]) -> dict[str, Any]:
    """1 -> 2: ``training.dtype``, float32 unless said, becomes ``precision``. Adapters always were in fp32."""
    training = dict(values.get("training") or {})
    dtype = training.pop("dtype", "float32")
    if dtype == "bfloat16":
        training["precision"] = "bf16-pure" if training.get("lora") is None else "bf16"
    else:
        training["precision"] = "fp32" if dtype == "float32" else dtype
    return {**values, "training": training}


STEPS: Mapping[int, Step] = {0: _saves_by_itself, 1: _precision_was_dtype}


def migrated(values: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The values as today's version has them. ConfigError for a version that is none or newer than this selectkd.

    >>> migrated({"version": 0, "training": {"seed": 5}}, source="recipe")
    {'version': 2, 'training': {'save_every': None, 'seed': 5, 'precision': 'fp32'}}
    """
    version = values.get("version", VERSION)
    if isinstance(version, bool) or not isinstance(version, int) or not 0 <= version <= VERSION:
        raise ConfigError(
            f"{source}: version = {str(version)[:40]!r}; this selectkd reads 0 to {VERSION}. "
            "Leave the key out, or install the selectkd that the recipe was written for."
        )
    for step in range(version, VERSION):
        if not isinstance(values.get("training") or {}, dict):
            break  # said better by the check of types
        values = STEPS[step](values)
    return {**values, "version": VERSION} if "version" in values else values
