"""The heavy parts of a checkpoint: the student's trained weights and the optimizer, sharded or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from selectkd.errors import IntegrityError
from selectkd.models.sharded import like


class Weights:
    """What a step may change of a model: its trained parameters and persistent buffers, set in place.

    Frozen weights (the base under an adapter) come from the recipe, which a resumed run shares.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def _tensors(self) -> dict[str, Tensor]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        kept = set(self.model.state_dict())
        buffers = {name: buffer for name, buffer in self.model.named_buffers() if name in kept}
        return {**trained, **buffers}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._tensors())

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises IntegrityError where names or shapes are not the model's."""
        tensors = self._tensors()
        for name in sorted(set(tensors) ^ set(state)):
            side = "the checkpoint lacks" if name in tensors else "the student has no"
            raise IntegrityError(f"{side} {name}: the checkpoint belongs to another student.")
        for name, tensor in tensors.items():
            if tensor.shape != state[name].shape:
                raise IntegrityError(
                    f"{name} has shape {tuple(tensor.shape)}, {tuple(state[name].shape)} in the checkpoint: it is "
                    "of another student."
                )
            tensor.copy_(like(state[name], tensor))


class OptimizerState:
    """An optimizer's state, whole on disk whatever the sharding of its parameters is."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, Tensor) and value.shape == parameters[index].shape and value.ndim:
                    entries[name] = like(value, parameters[index])
        self.optimizer.load_state_dict(state)
        for index, entries in state["state"].items():  # torch gives all of it its parameter's dtype
            kept = self.optimizer.state[parameters[index]]
            for name, value in entries.items():
                if isinstance(value, Tensor) and kept[name].dtype != value.dtype:
                    kept[name] = value.to(kept[name].device)


class Named:
    """Attributes of an object as a part: ``Named(model, "chunk")``."""

    def __init__(self, owner: Any, *names: str) -> None:
        self.owner, self.names = owner, names

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self.owner, name) for name in self.names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.names:
            setattr(self.owner, name, state[name])
