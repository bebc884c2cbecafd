"""The recipes that come with selectkd: ``recipes/`` of a checkout, ``selectkd/recipes`` of an installed wheel."""

from __future__ import annotations

from pathlib import Path

from selectkd.errors import ConfigError


def recipes_folder() -> Path:
    """The folder of the recipes that come with selectkd."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def shipped_recipe(name: str) -> Path:
    """The path of a recipe by its name, ``demo`` or ``qwen2-7b-to-1.5b``; ConfigError, naming them all, for another.

    >>> shipped_recipe("demo").name
    'demo.yaml'
    """
    known = {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}; there are {', '.join(known)}.")
    return known[name]
