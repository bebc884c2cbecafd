"""Rows of token ids that were made elsewhere, with the labels and masks that say which of them are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selectkd.data.fields import Where, refuse, shown

MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask", "response_mask")
"""Fields of 1 for a token that is trained and 0 for another: TRL's, transformers', Megatron's and verl's."""
OTHERS = ("attention_mask", "special_tokens_mask")
"""Masks that say nothing of training."""


def token_row(record: Mapping[str, Any], where: Where) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The ids of a row without its padding, and which are trained: those that its labels and every mask train."""
    ids = _integers(record.get("input_ids"), where.at("input_ids"))
    labels, trained = record.get("labels"), [True] * len(ids)
    if labels is not None:
        at = where.at("labels")
        values = _integers(labels, at, of=len(ids))
        for index, (token, label) in enumerate(zip(ids, values, strict=True)):
            if label not in (-100, token):
                refuse(
                    at.at(index),
                    f"is {label}, but input_ids[{index}] is {token}: labels must not be shifted.",
                )
        trained = [label != -100 for label in values]
    for name in _masks(record, where):
        values = _integers(record[name], where.at(name), of=len(ids), masks=True)
        trained = [bool(value) and kept for value, kept in zip(values, trained, strict=True)]
    given = record.get("attention_mask")
    given = [1] * len(ids) if given is None else given
    present = _integers(given, where.at("attention_mask"), of=len(ids), masks=True)
    kept = [index for index, value in enumerate(present) if value]
    return tuple(ids[i] for i in kept), tuple(trained[i] for i in kept)


def _masks(record: Mapping[str, Any], where: Where) -> list[str]:
    """The masks of training that a row has. DataError for a mask of another name, which may be one too."""
    names = [
        str(name)
        for name, value in record.items()
        if value is not None and str(name).endswith(("mask", "masks"))
    ]
    for name in names:
        if name not in (*MASKS, *OTHERS):
            refuse(
                where.at(name),
                f"no mask is called so. What would work: {', '.join(MASKS)} (1 is trained), or labels. Rename it, or "
                "take it out.",
            )
    return [name for name in names if name in MASKS]


def _integers(value: Any, where: Where, *, of: int | None = None, masks: bool = False) -> list[int]:
    """A list of integers, of the length of input_ids when ``of`` is given; ``masks`` holds 0, 1 or booleans."""
    if not isinstance(value, list | tuple):
        refuse(where, f"needs a list of integers, not {shown(value)}.")
    for index, item in enumerate(value):
        if not isinstance(item, int) or (isinstance(item, bool) and not masks):
            refuse(where.at(index), f"needs an integer, not {shown(item)}.")
        if masks and item not in (0, 1):
            refuse(where.at(index), f"is {item}; a mask holds 0 and 1.")
    if of is not None and len(value) != of:
        refuse(where, f"has {len(value)} entries, but input_ids has {of}.")
    return [int(item) for item in value]
