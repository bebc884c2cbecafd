"""The data files of a folder: which split each belongs to, and which of them are read."""

from __future__ import annotations

import re
from pathlib import Path

from selectkd.errors import ConfigError, DataError

PACKED = (".gz", ".zst")
"""Compressions, of every kind but Parquet and Arrow, which compress within."""
FAMILIES = tuple(
    tuple(ending for suffix in suffixes for ending in (suffix, *(suffix + packed for packed in PACKED)))
    for suffixes in ((".jsonl", ".json", ".ndjson", ".parquet", ".arrow"), (".csv", ".tsv"), (".txt",))
)
"""Kinds of data files. Of a folder those of one family are read: a table or a text beside records is about them."""
KINDS = tuple(ending for family in FAMILIES for ending in family)
SUFFIXES = tuple(ending for ending in KINDS if not ending.endswith(PACKED))
SPLIT = re.compile(
    r"(?:^|[^a-z0-9])((?:train|training|test|testing|validation|valid|val|dev|evals|eval|evaluation)"
    r"(?:_(?![0-9]+(?:[^a-z0-9]|$))[a-z0-9]+)*)[0-9]*(?=[^a-z0-9]|$)"
)
"""A split in a path: train, or train_sft; the numbers of a shard do not belong to it, in train1 either."""
ABOUT = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
"""Files about a data set, which hold no records."""


def split_of(path: str) -> str | None:
    """The split that a path within a folder names, None where it names none.

    >>> [split_of(p) for p in ("data/train_sft-00000-of-00002.parquet", "gsm8k_test1.jsonl", "train/a.json", "a.json")]
    ['train_sft', 'test', 'train', None]
    """
    bare = path.lower()
    for ending in KINDS:
        bare = bare.removesuffix(ending)
    found = SPLIT.findall(bare)
    return found[-1] if found else None


def files_of(names: list[str], folder: str, split: str | None, config: str | None = None) -> list[str]:
    """The data files of one split among the ``names`` within a folder, or all of them where names tell no splits apart.

    Without ``split`` that is ``train`` where there is one; files that name no split are that beside files for
    evaluation alone. Raises ConfigError naming the splits, or the configurations
    that have files of the split in folders of their own, where more than one could be meant; DataError for a split that
    is not there.
    """
    seen = [
        name
        for name in sorted(names)
        if Path(name).name not in ABOUT and not any(part.startswith(".") for part in name.split("/"))
    ]
    family = next((one for one in FAMILIES if any(name.lower().endswith(one) for name in seen)), ())
    files = {name: split_of(name) for name in seen if family and name.lower().endswith(family)}
    if not files:
        raise DataError(f"{folder}: no data files. What would work: {', '.join(SUFFIXES)} in the folder.")
    splits = sorted({each for each in files.values() if each is not None})
    held_out = bool(splits) and not any(each.startswith("train") for each in splits)
    if held_out and None in files.values():
        files, splits = {name: each or "train" for name, each in files.items()}, [*splits, "train"]
    wanted = split or ("train" if "train" in splits else None)
    if wanted is None and splits and (len(splits) > 1 or None in files.values()):
        more = "" if None not in files.values() else " and files of none"
        way = (
            "None is for training by its name: call that train, or choose one with split: NAME."
            if held_out
            else f"Choose one, for example split: {splits[-1]}."
        )
        raise ConfigError(f"{folder} holds the splits {', '.join(splits)}{more}. {way}")
    chosen = [name for name, each in files.items() if wanted is None or each == wanted.lower()]
    if not chosen:
        known = f"Its splits: {', '.join(splits)}." if splits else f"Its files: {', '.join(list(files)[:6])}."
        raise DataError(f"{folder}: no file of split {wanted!r}. {known}")
    return _of_config(folder, chosen, config) if splits else chosen


def _of_config(folder: str, names: list[str], config: str | None) -> list[str]:
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
