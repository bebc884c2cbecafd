"""The data files of a folder: which split each belongs to, and which of them are read."""

from __future__ import annotations

import re
from pathlib import Path

from selectkd.errors import ConfigError, DataError

SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")
TABLES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
KINDS = tuple(ending for suffix in SUFFIXES for ending in (suffix, f"{suffix}.gz"))
SPLIT = re.compile(
    r"(?:^|[^a-z0-9])((?:train|training|test|testing|validation|valid|val|dev|eval|evaluation)"
    r"(?:_(?![0-9]+(?:[^a-z0-9]|$))[a-z0-9]+)*)(?=[^a-z0-9]|$)"
)
"""A split in a path: train, or train_sft; the numbers of a shard do not belong to it."""


def split_of(path: str) -> str | None:
    """The split that a path within a folder names, None where it names none.

    >>> [split_of(p) for p in ("data/train_sft-00000-of-00002.parquet", "gsm8k_test.jsonl", "train/a.json", "a.json")]
    ['train_sft', 'test', 'train', None]
    """
    bare = path.lower()
    for ending in KINDS:
        bare = bare.removesuffix(ending)
    found = SPLIT.findall(bare)
    return found[-1] if found else None


def files_of(folder: Path, split: str | None, config: str | None = None) -> list[Path]:
    """The data files of one split of a folder, or of all of it where names tell no splits apart.

    Without ``split`` that is ``train`` where there is one. Raises ConfigError naming the splits, or the configurations
    that have files of the split in folders of their own, where more than one could be meant; DataError for a split that
    is not there.
    """
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file()
        and path.name.lower().endswith((*KINDS, *TABLES))
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    files = {name: split_of(name) for name in names if name.lower().endswith(KINDS)}
    if not files:
        if names:
            return [folder / names[0]]  # a table, whose reader says how to convert it
        raise DataError(f"{folder}: no data files. What would work: {', '.join(SUFFIXES)} in the folder.")
    splits = sorted({each for each in files.values() if each is not None})
    wanted = split or ("train" if "train" in splits else None)
    if wanted is None and splits and (len(splits) > 1 or None in files.values()):
        more = "" if None not in files.values() else " and files of none"
        raise ConfigError(
            f"{folder} holds the splits {', '.join(splits)}{more}. Choose one, for example split: {splits[-1]}."
        )
    chosen = [name for name, each in files.items() if wanted is None or each == wanted.lower()]
    if not chosen:
        known = f"Its splits: {', '.join(splits)}." if splits else f"Its files: {', '.join(list(files)[:6])}."
        raise DataError(f"{folder}: no file of split {wanted!r}. {known}")
    return [folder / name for name in (_of_config(folder, chosen, config) if splits else chosen)]


def _of_config(folder: Path, names: list[str], config: str | None) -> list[str]:
    """The files of one configuration: those in the same folder, once the folders that tell the split are left out."""
    where = {
        name: "/".join(part for part in Path(name).parts[:-1] if part != "data" and split_of(part) is None)
        for name in names
    }
    kinds = sorted(set(where.values()))
    if config is not None:
        return [name for name in names if where[name] == config] or names
    if len(kinds) > 1:
        raise ConfigError(
            f"{folder} holds the configurations {', '.join(kind or '.' for kind in kinds)}. Choose one, for example "
            f"config: {kinds[-1]}, or name its folder."
        )
    return names
