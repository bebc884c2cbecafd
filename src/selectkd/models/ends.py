"""The tokens that end a text, by the generation settings of a model's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from selectkd.models.folder import read_json
from selectkd.models.load import _local, _locate

FILES = ("generation_config.json", "config.json")


def end_ids(spec: str | os.PathLike[str], tokenizer: Any, *, revision: str | None = None) -> frozenset[int]:
    """The eos_token_id of a model's generation_config.json, or else of its config.json.

    Ids that are no added token of ``tokenizer`` are left out: a configuration's default may mean any word. Empty for a
    GGUF file, whose tokenizer has them. No weight is read.
    """
    path = _local(spec)
    if path is not None and path.is_file():
        return frozenset()
    folder = _locate(spec, revision, None, weights=False)[0]
    for name in FILES:
        file = Path(folder) / name
        value = read_json(file).get("eos_token_id") if file.is_file() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            return frozenset(one for one in ids if type(one) is int and one in tokenizer.added_tokens_decoder)
    return frozenset()
