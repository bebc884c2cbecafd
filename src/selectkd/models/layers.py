"""The layers of a decoder, and the configuration of a model that has some of them alone.

A layer's kind may follow from its number: a list entry, a list of numbers, how many come first, a period. Each is
written anew for the layers that stay, and what was built is compared with what it was cut from.
"""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from selectkd.errors import ConfigError
from selectkd.models.head import text_decoder_of

NUMBERED = frozenset(
    {"mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers"}
    | {"hybrid_layer_ids", "ple_layer_ids", "global_attn_indexes"}
)
"""Keys that list the numbers of the layers of one kind."""
LEADING = ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")
"""Keys that say how many layers at the beginning are of one kind."""
PERIODIC = (("attn_layer_period", "attn_layer_offset"), ("expert_layer_period", "expert_layer_offset"))
"""Keys by which layer i is of one kind where i % period == offset."""
CYCLES = ("block_types",)
"""Keys of a list that is repeated until all layers have an entry."""
PLACE = re.compile(r"(^|_)(idx|index|id|number)$|^_[a-z]|^training$")
"""Attributes of a module that hold its place, or torch's own."""


def layers_of(model: Any) -> nn.ModuleList:
    """The decoder's list of layers; ConfigError for an architecture without one."""
    decoder = text_decoder_of(model)
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ConfigError(
        f"{type(model).__name__} has no plain list of layers to cut. Name a student model instead."
    )


def cut_config(config: Any, kept: Sequence[int]) -> Any:
    """The configuration of a model with the layers ``kept`` of this one's, renumbered from 0.

    ConfigError where the kinds of these layers follow no period that the configuration could say.
    """
    values = config.to_dict()
    text = config.get_text_config()
    inner = next((name for name in config.sub_configs if getattr(config, name, None) is text), None)
    keys = values if inner is None else values[inner]
    total = text.num_hidden_layers
    for name, value in keys.items():
        if not isinstance(value, list | tuple):
            continue
        if name in NUMBERED:
            keys[name] = [new for new, old in enumerate(kept) if old in value]
        elif name in CYCLES:
            keys[name] = [value[old % len(value)] for old in kept]
        elif re.search("layer|_types?$|pattern", name) and len(value) == total:
            keys[name] = [value[old] for old in kept]
    for name in LEADING:
        if isinstance(keys.get(name), int):
            keys[name] = sum(old < keys[name] for old in kept)
    for period, offset in PERIODIC:
        if isinstance(keys.get(period), int) and isinstance(keys.get(offset), int):
            keys[period], keys[offset] = _period(keys[period], keys[offset], kept, period)
    count = text.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if count in keys:
        keys[count] = len(kept)
    return type(config).from_dict(values)


def check_cut(teacher: Any, student: Any, kept: Sequence[int]) -> None:
    """ConfigError unless each layer of the student is of the kind of the teacher's that it was cut from.

    Compared are the classes of all modules, their plain attributes, and the shapes of their tensors.
    """
    ours = layers_of(student)
    theirs = layers_of(teacher)
    if len(ours) != len(kept):
        raise _other(teacher, "the number of layers")
    for new, old in enumerate(kept):
        pairs = dict(ours[new].named_modules()), dict(theirs[old].named_modules())
        if pairs[0].keys() != pairs[1].keys():
            raise _other(teacher, f"layer {old}'s modules")
        for name, module in pairs[0].items():
            if (found := _kind(module)) != (wanted := _kind(pairs[1][name])):
                key = next(iter(dict(found.items() ^ wanted.items())))
                raise _other(teacher, f"layer {old}'s {'.'.join(filter(None, (name, key)))}")


def _kind(module: nn.Module) -> dict[str, str]:
    """A module's class, plain attributes and tensor shapes; its numbers and its place are left out."""
    plain = {
        name: repr(value)
        for name, value in vars(module).items()
        if not PLACE.search(name) and isinstance(value, bool | int | float | str)
    }
    tensors = {
        name: str(tuple(tensor.shape))
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    }
    return {"class": type(module).__name__, **plain, **tensors}


def _period(period: int, offset: int, kept: Sequence[int], name: str) -> tuple[int, int]:
    """A period and an offset by which the layers ``kept`` are of the kinds that they are by these."""
    kinds = [old % period == offset for old in kept]
    for new in range(1, len(kept) + 1):
        for first in range(new):
            if [place % new == first for place in range(len(kept))] == kinds:
                return new, first
    if not any(kinds):
        return len(kept) + 1, len(kept)
    raise ConfigError(
        f"layers {', '.join(map(str, kept))} do not form a model: layer types repeat by {name} = {period}, and "
        "these layers do not follow that pattern. Keep layers at even distances, or name a student model."
    )


def _other(teacher: Any, what: str) -> ConfigError:
    return ConfigError(
        f"{type(teacher).__name__} cannot be cut this way: {what} depends on a layer's number, which would change in "
        "the smaller model. Keep other layers, or name a student model."
    )
