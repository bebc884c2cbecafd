"""Where the weights of a teacher in memory are: on the device that trains, in main memory, or over the ranks."""

# torch types an attribute of a module as Tensor | Module; what this reads of one is neither
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from selectkd.errors import ConfigError
from selectkd.models.head import decoder_of
from selectkd.teachers.offloaded import OffloadedLayers

Placement = Literal["device", "offloaded", "sharded"]


def place_on(model: Any, device: torch.device, placement: Placement = "device") -> None:
    """Puts a frozen causal language model where its forward pass on ``device`` finds it, in place, once.

    device: all of it there. offloaded: its layers stay in main memory, and the device has two of them at a time, see
    ``OffloadedLayers``; where the device is a CPU, that is where they are. sharded: a rank holds its part of each layer
    (``fully_shard``), and all ranks must run the model at the same time. The other weights, embeddings, final norm and
    head, are whole on the device either way, since the loss multiplies by the head. ConfigError for a model without a
    list of layers.
    """
    if placement == "device":
        model.to(device)
        return
    decoder = decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{type(decoder).__name__} has no list of layers, which teacher.placement = {placement!r} is about. "
            "Use placement: device."
        )
    decoder.layers = nn.ModuleList()  # so that what goes to the device is all but the layers
    model.to(device)
    decoder.layers = layers
    if placement == "sharded":
        for layer in layers:
            fully_shard(layer, reshard_after_forward=True)
    elif device.type != "cpu":
        OffloadedLayers(layers, device)


def check_placement(placement: Placement) -> None:
    """ConfigError where the ranks to shard over are missing."""
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    if placement == "sharded" and alone:
        raise ConfigError(
            "teacher.placement = 'sharded' needs several ranks, and this is one process. Start it with torchrun, or "
            "use placement: offloaded."
        )
