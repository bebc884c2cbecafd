"""State as JSON and tensors: any nest of dicts, lists, tuples, bytes, numbers, text and tensors, bit for bit.

Nothing here can run code when it is read, which is why it is not pickle.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from selectkd.errors import IntegrityError
from selectkd.models import sharded

MARK = "$"
"""First letter of the only key of a JSON object that stands for something JSON does not have."""


def split(state: Any, tensors: dict[str, Tensor]) -> Any:
    """``state`` as plain JSON; its tensors go to ``tensors`` under names that the JSON refers to.

    Tensors that share their memory (tied weights) are kept once. TypeError for what is none of the above.

    >>> found: dict[str, Tensor] = {}
    >>> plain = split({"t": (1, torch.ones(2)), 3: float("inf")}, found)
    >>> join(plain, found)[3], join(plain, found)["t"]
    (inf, (1, tensor([1., 1.])))
    """
    known: dict[Any, str] = {}

    def plain(value: Any, at: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"$float": repr(value)}
        if isinstance(value, Tensor):
            value = whole(value)
            same = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if value.numel() == 0 or same not in known:
                known[same] = at
                tensors[at] = value
                return {"$tensor": at}
            return {"$tensor": known[same]}
        if isinstance(value, np.ndarray):
            return {"$array": plain(torch.from_numpy(_signed(value)), at), "dtype": value.dtype.str}
        if isinstance(value, bytes):
            return {"$bytes": value.hex()}
        if isinstance(value, tuple):
            return {"$tuple": [plain(each, f"{at}.{i}") for i, each in enumerate(value)]}
        if isinstance(value, list):
            return [plain(each, f"{at}.{i}") for i, each in enumerate(value)]
        if isinstance(value, dict):
            if all(isinstance(key, str) and not key.startswith(MARK) for key in value):
                return {key: plain(each, f"{at}.{key}" if at else key) for key, each in value.items()}
            pairs = [
                [plain(k, f"{at}.k{i}"), plain(v, f"{at}.{i}")] for i, (k, v) in enumerate(value.items())
            ]
            return {"$dict": pairs}
        raise TypeError(f"{at or 'the state'} is a {type(value).__name__}, which a checkpoint cannot hold")

    return plain(state, "")


def join(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """The state that ``split`` took apart; IntegrityError where a tensor is missing or a mark unknown."""
    if isinstance(plain, list):
        return [join(each, tensors) for each in plain]
    if not isinstance(plain, dict):
        return plain
    mark = next((key for key in plain if key.startswith(MARK)), None)
    if mark is None:
        return {key: join(each, tensors) for key, each in plain.items()}
    inside = plain[mark]
    if mark == "$tensor" and inside in tensors:
        return tensors[inside]
    if mark == "$float":
        return float(inside)
    if mark == "$bytes":
        return bytes.fromhex(inside)
    if mark == "$tuple":
        return tuple(join(each, tensors) for each in inside)
    if mark == "$dict":
        return {join(key, tensors): join(value, tensors) for key, value in inside}
    if mark == "$array":
        return join(inside, tensors).numpy().view(np.dtype(plain["dtype"]))
    raise IntegrityError(f"a state holds {mark}: {str(inside)[:60]!r}, which this version cannot read.")


def gather(state: Any) -> None:
    """Another rank's part in the ``split`` of a state: tensors that lie in parts are put together, which needs every
    rank. Whole tensors are not copied.
    """
    if isinstance(state, Tensor):
        sharded.whole(state)
    elif isinstance(state, dict):
        for each in state.values():
            gather(each)
    elif isinstance(state, list | tuple):
        for each in state:
            gather(each)


def whole(tensor: Tensor) -> Tensor:
    """A tensor in this process's memory, contiguous; gathered where it is sharded, a collective call then."""
    return sharded.whole(tensor).cpu().contiguous()


def _signed(array: Any) -> Any:
    """The same bytes as signed integers of the same width: torch has no unsigned ones for all widths."""
    return np.ascontiguousarray(array).view(f"i{array.dtype.itemsize}")
