"""Layers whose weights stay in main memory: each is on the device while it works, the next one on its way there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

ALIGNED = 256
"""Bytes between two tensors of a layer's memory begin at a multiple of this, as torch's own allocations do."""


class Piece(NamedTuple):
    """One weight or buffer of a layer, and where its bytes begin."""

    module: nn.Module
    name: str
    start: int
    like: Tensor  # its dtype and shape, without memory

    def view(self, memory: Tensor) -> Tensor:
        """The tensor in ``memory`` [bytes]."""
        size = self.like.numel() * self.like.element_size()
        return memory[self.start : self.start + size].view(self.like.dtype).view(self.like.shape)


class OffloadedLayers:
    """Two places on ``device``, each as large as the largest layer: one layer works in the first while the next is
    copied into the second, by a stream of its own and from pinned memory.

    A layer's weights are then where they are called, to the same bits. No memory is given or taken back on the way, so
    nothing waits but a layer for its own copy, and a copy for the layer before it in its place. On a device without
    streams of CUDA's kind a layer is copied when it is called.
    """

    def __init__(self, layers: nn.ModuleList, device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.cuda = device.type == "cuda"
        self.pieces = [_pieces(layer) for layer in layers]
        self.memory = [self._taken_over(pieces) for pieces in self.pieces]
        largest = max(memory.numel() for memory in self.memory)
        self.places = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(2)]
        self.holds: list[int | None] = [None, None]
        if self.cuda:
            self.side = torch.cuda.Stream(device)
            self.copied, self.free = ([torch.cuda.Event() for _ in range(2)] for _ in range(2))
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda *_, number=number: self._before(number))
            layer.register_forward_hook(lambda *_, number=number: self._after(number))

    def _taken_over(self, pieces: list[Piece]) -> Tensor:
        """A layer's weights in one piece of main memory, which the layer has them in from now on."""
        last = pieces[-1]
        size = last.start + last.like.numel() * last.like.element_size()
        memory = torch.empty(size, dtype=torch.uint8, pin_memory=self.cuda)
        for piece in pieces:
            piece.view(memory).copy_(_tensor(piece))
        _set(pieces, memory)
        return memory

    def _before(self, number: int) -> None:
        if number not in self.holds:  # the first call of all, or a layer out of turn
            self._copy(number, 0)
        place = self.holds.index(number)
        if self.cuda:
            torch.cuda.current_stream(self.device).wait_event(self.copied[place])
        _set(self.pieces[number], self.places[place])
        following = (number + 1) % len(self.layers)
        if self.cuda and following not in self.holds:
            self._copy(following, 1 - place)

    def _after(self, number: int) -> None:
        if self.cuda:
            self.free[self.holds.index(number)].record(torch.cuda.current_stream(self.device))
        _set(self.pieces[number], self.memory[number])

    def _copy(self, number: int, place: int) -> None:
        memory, self.holds[place] = self.memory[number], number
        there = self.places[place][: memory.numel()]
        if not self.cuda:
            there.copy_(memory)
            return
        self.side.wait_event(self.free[place])
        with torch.cuda.stream(self.side):
            there.copy_(memory, non_blocking=True)
            self.copied[place].record(self.side)


def _pieces(layer: nn.Module) -> list[Piece]:
    found, start = [], 0
    for module in layer.modules():
        named = [*module._parameters.items(), *module._buffers.items()]
        for name, tensor in named:
            if tensor is not None:
                found.append(Piece(module, name, start, torch.empty_like(tensor, device="meta")))
                start += -(-tensor.numel() * tensor.element_size() // ALIGNED) * ALIGNED
    return found


def _tensor(piece: Piece) -> Tensor:
    return getattr(piece.module, piece.name).detach()


def _set(pieces: list[Piece], memory: Tensor) -> None:
    """Has a layer's weights and buffers lie in ``memory``."""
    for piece in pieces:
        tensor, module = piece.view(memory), piece.module
        if piece.name in module._parameters:
            module._parameters[piece.name] = nn.Parameter(tensor, requires_grad=False)
        else:
            module._buffers[piece.name] = tensor
