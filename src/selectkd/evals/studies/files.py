"""Whether the files behind a row are still what they were: weights, text and caches that a recipe names."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from selectkd.config.load import recipe_from
from selectkd.config.schema import Recipe
from selectkd.config.teachers import CacheTeacher
from selectkd.data.durable import checksum


def files_read(values: Mapping[str, Any]) -> str | None:
    """The checksum, 16 hexadecimal digits, of the weights and the text in local files and folders that a recipe names:
    the same names can stand for models that were made again. Of a cache without the name of its teacher, of its index.
    None where the folder of a model is not there."""
    recipe = recipe_from(copy.deepcopy(dict(values)))
    names = [*recipe.models, *(getattr(one, "model", None) for one in recipe.teachers)]
    folders = [Path(name).expanduser() for name in names if name]
    if any(str(folder).startswith((".", "/")) and not folder.is_dir() for folder in folders):
        return None
    found = {file for folder in folders for file in folder.glob("*.safetensors")}
    found |= {*_text(recipe), *_caches(recipe)}
    sums = [_checksum(file, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(found)]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def same_files(row: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether a row is of the files that a recipe names as they are. True where a model is not there to compare with,
    and for a row that does not say what it read."""
    read = files_read(values)
    return read is None or row.get("files", read) == read


def _text(recipe: Recipe) -> Iterator[Path]:
    data = recipe.data.model_dump(mode="json")
    for source in [*data["sources"], data["evaluation"]]:
        if isinstance(source, dict) and source.get("path"):
            path = Path(source["path"]).expanduser()
            yield from [path] if path.is_file() else (one for one in path.rglob("*") if one.is_file())


def _caches(recipe: Recipe) -> Iterator[Path]:
    for teacher in recipe.teachers:
        if isinstance(teacher, CacheTeacher) and teacher.model is None:
            yield from Path(teacher.cache).expanduser().glob("index.json")


@lru_cache(maxsize=4096)
def _checksum(file: Path, size: int, changed: int) -> str:
    return checksum(file)
