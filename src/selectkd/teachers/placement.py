"""Where the weights of a teacher in memory are: on the device that trains, in main memory, or over the ranks."""

# torch types an attribute of a module as Tensor | Module; what this reads of one is neither
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from selectkd.errors import ConfigError
from selectkd.models.head import text_decoder_of
from selectkd.models.sharded import Spread, is_sharded, shard
from selectkd.teachers.offloaded import OffloadedLayers

Placement = Literal["device", "offloaded", "sharded"]
PLACEMENT = "teacher.placement: sharded"


def place_on(model: Any, device: torch.device, placement: Placement = "device") -> None:
    """Puts a frozen causal language model where its forward pass on ``device`` finds it, in place, once.

    device: all of it there. offloaded: its layers stay in main memory, and the device has two of them at a time, see
    ``OffloadedLayers``; where the device is a CPU, that is where they are. sharded: a rank holds its part of every
    weight (``models.sharded``; a model that is loaded so stays as it is), and all ranks must run the model at the same
    time. The head, which the loss multiplies by, is whole on the device either way. ConfigError for a model without a
    list of layers.
    """
    if placement == "device":
        model.to(device)
        return
    if placement == "sharded":
        if not is_sharded(model):
            shard(model, Spread.of(None, PLACEMENT))
        return
    decoder = text_decoder_of(model)
    layers = getattr(decoder, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{type(decoder).__name__} has no list of layers, which teacher.placement = 'offloaded' is about. "
            "Use placement: device."
        )
    decoder.layers = nn.ModuleList()  # so that what goes to the device is all but the layers
    model.to(device)
    decoder.layers = layers
    if device.type != "cpu":
        OffloadedLayers(layers, device)
