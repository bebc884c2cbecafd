"""Rounding that looks at texts: what a weight loses by being rounded is made up for by the weights after it.

o, i outputs and inputs of a linear layer; t tokens of the texts. For inputs X [t, i] a layer's output is off by
|X (W - Q)^T|^2, in which the errors of two weights that see alike inputs can cancel. GPTQ (Frantar et al. 2022,
arXiv 2210.17323) rounds column after column and moves the columns still to come against the error so far, along the
inverse of X^T X. Each row of X has length 1 here: the few tokens with enormous hidden states, such as a text's first,
would decide everything. Scales are those of GGUF's own rounding of each block, so that a file holds the very numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.models.export.gguf.tensors import BLOCK

DAMPING = 0.01
"""Of the mean of the diagonal of X^T X, added to it: for directions that the texts never take."""
MOST = 2**28
"""Numbers of X^T X held at once, 1 GiB; a larger model reads the texts several times."""


def calibrated(model: Any, texts: Sequence[Sequence[int]], kind: str) -> Any:
    """A copy of a model whose layers hold numbers that GGUF's ``kind`` has, chosen so that their outputs move least.

    texts: ids that the layers' inputs are taken from. kind: q8_0, q5_1 or q4_0; the head is rounded to q8_0, as in the
    file, and a tied embedding with it. Left alone are layers whose rows are no whole blocks and those no text reaches.
    """
    found = copy.deepcopy(model)
    head = found.get_output_embeddings()
    layers = [one for one in found.modules() if isinstance(one, nn.Linear) and one.in_features % BLOCK == 0]
    for group in _groups(layers):
        for layer, products in _products(found, group, texts):
            layer.weight.data = rounded(layer.weight.detach(), products, "q8_0" if layer is head else kind)
    return found


def _groups(layers: Sequence[nn.Linear]) -> Iterator[list[nn.Linear]]:
    """The layers in order, as many at a time as ``MOST`` allows."""
    group: list[nn.Linear] = []
    held = 0
    for layer in layers:
        size = layer.in_features**2
        if group and held + size > MOST:
            yield group
            group, held = [], 0
        group.append(layer)
        held += size
    if group:
        yield group


@torch.no_grad()
def _products(
    model: Any, layers: Sequence[nn.Linear], texts: Sequence[Sequence[int]]
) -> Iterator[tuple[nn.Linear, Tensor]]:
    """(layer, X^T X [i, i]) of the layers that the texts reach."""
    sums: dict[nn.Linear, Tensor] = {}
    with _watched(layers, sums):
        for ids in texts:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
    yield from sums.items()


@contextmanager
def _watched(layers: Sequence[nn.Linear], sums: dict[nn.Linear, Tensor]) -> Iterator[None]:
    """While it lasts each layer adds the products of its inputs, each of length 1, to ``sums``."""

    def add(layer: Any, given: tuple[Any, ...]) -> None:
        inputs = given[0].detach().flatten(0, -2).float()
        inputs = nn.functional.normalize(inputs)
        product = inputs.T @ inputs
        sums[layer] = sums[layer] + product if layer in sums else product

    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def rounded(weight: Tensor, products: Tensor, kind: str) -> Tensor:
    """A weight [o, i] in the numbers of ``kind``, fp32, for inputs whose X^T X is ``products`` [i, i]."""
    toward = _toward(products)
    rest, found = weight.float().clone(), torch.zeros_like(weight, dtype=torch.float32)
    for start in range(0, rest.shape[1], BLOCK):
        block = slice(start, start + BLOCK)
        grid, errors = Grid.of(rest[:, block], kind), torch.zeros_like(rest[:, block])
        for place in range(BLOCK):
            column = start + place
            found[:, column] = grid.nearest(rest[:, column], place)
            errors[:, place] = (rest[:, column] - found[:, column]) / toward[column, column]
            rest[:, column : block.stop] -= errors[:, place, None] * toward[column, column : block.stop]
        rest[:, block.stop :] -= errors @ toward[block, block.stop :]
    return found


def _toward(products: Tensor) -> Tensor:
    """The upper Cholesky factor [i, i] of the inverse of the damped products: row j says where the error of column j
    goes.
    """
    size = products.diagonal().double().mean()
    damping = torch.where(size > 0, DAMPING * size, 1.0)  # a layer whose inputs are all zero
    damped = products.double() + torch.eye(len(products), device=products.device) * damping
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()


@dataclass(frozen=True)
class Grid:
    """The numbers of a block: offset + code x step, with codes of lowest to highest.

    step, offset [o, 1], as fp16 has them. given [o, 32]: codes that are set, NaN elsewhere: those of the weights that
    the scale comes from, so that rounding the rounded block again gives the same numbers.
    """

    step: Tensor
    offset: Tensor
    lowest: int
    highest: int
    given: Tensor

    @classmethod
    def of(cls, block: Tensor, kind: str) -> Grid:
        """GGUF's own scale of a block [o, 32]."""
        given = torch.full_like(block, torch.nan)
        zero = torch.zeros_like(block[:, :1])
        if kind == "q5_1":
            low, high = block.amin(1, keepdim=True), block.amax(1, keepdim=True)
            given.scatter_(1, block.argmax(1, keepdim=True), 31).scatter_(1, block.argmin(1, keepdim=True), 0)
            return cls(_half((high - low) / 31), _half(low), 0, 31, given)
        place = block.abs().argmax(1, keepdim=True)
        largest = block.gather(1, place)
        if kind == "q4_0":
            return cls(_half(largest / -8), zero, -8, 7, given.scatter_(1, place, -8))
        return cls(
            _half(largest.abs() / 127), zero, -127, 127, given.scatter_(1, place, 127 * largest.sign())
        )

    def nearest(self, column: Tensor, place: int) -> Tensor:
        """The column [o] at a place of the block in its numbers."""
        step, offset = self.step[:, 0], self.offset[:, 0]
        codes = torch.where(step == 0, 0.0, (column - offset) / step).round().clamp(self.lowest, self.highest)
        given = self.given[:, place]
        return torch.where(given.isnan(), codes, given) * step + offset


def _half(values: Tensor) -> Tensor:
    return values.half().float()
