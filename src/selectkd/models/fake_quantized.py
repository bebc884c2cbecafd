"""Weights that are rounded in every forward pass as their export rounds them (quantisation-aware distillation).

o, i outputs and inputs of a linear layer; g weights of a row that share a scale. Parameters keep their names and their
fine values: the optimizer moves these, and the gradient passes the rounding unchanged (straight-through estimator,
Bengio et al. 2013, arXiv 1308.3432).
"""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError
from selectkd.models.shape import without_reports

Rounding = Callable[[Tensor], Tensor]
"""A weight [o, i] -> what its integers times their scales come to, [o, i] in fp32."""
GGUF_BLOCK, INT4_GROUP = 32, 32
BITS = {"int8": 8, "int4": 4}


def q8_0(weight: Tensor) -> Tensor:
    """GGUF's Q8_0 of a weight [o, i], de-quantised: blocks of 32 with a scale in fp16, integers of -127 to 127.

    Rounding twice is rounding once. Source: gguf.quants.Q8_0, which it equals bit for bit.

    >>> q8_0(torch.tensor([[127.0] + [0.6] * 31]))[0, :2].tolist()
    [127.0, 1.0]
    """
    blocks = weight.detach().float().unflatten(-1, (-1, GGUF_BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    size = codes.abs()
    whole = size.floor()
    codes = codes.sign() * (whole + (2 * (size - whole)).floor())  # halves away from zero
    return (codes * scale.half().float()).flatten(-2)


def q4_0(weight: Tensor) -> Tensor:
    """GGUF's Q4_0 of a weight [o, i], de-quantised: blocks of 32 with a scale in fp16, integers of -8 to 7.

    The weight of largest size, with its sign, is -8 scales. Rounding twice is rounding once. Source: gguf.quants.Q4_0,
    which it equals bit for bit.
    """
    blocks = weight.detach().float().unflatten(-1, (-1, GGUF_BLOCK))
    scale = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    codes = (blocks * inverse + 8.5).trunc().clamp(0, 15) - 8
    return (codes * scale.half().float()).flatten(-2)


class TorchaoRounding:
    """torchao's symmetric integers of 8 or 4 bits with fp32 scales, by its own fake quantizer.

    group: weights of a row that share a scale; None: the whole row. ConfigError without the package.
    """

    def __init__(self, bits: int, group: int | None) -> None:
        check_package()
        from torchao.quantization.qat import IntxFakeQuantizeConfig, IntxFakeQuantizer  # pyright: ignore

        self.bits, self.group = bits, group
        dtype = {4: torch.int4, 8: torch.int8}[bits]
        grain: dict[str, Any] = {"granularity": "per_channel"} if group is None else {"group_size": group}
        self._rounded = IntxFakeQuantizer(IntxFakeQuantizeConfig(dtype, **grain))

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Tensor:
        return self._rounded(weight.float())

    def config(self) -> Any:
        """The configuration by which torchao stores the same integers."""
        from torchao.quantization import IntxWeightOnlyConfig  # pyright: ignore
        from torchao.quantization.granularity import PerAxis, PerGroup  # pyright: ignore

        grain = PerAxis(0) if self.group is None else PerGroup(self.group)
        return IntxWeightOnlyConfig({4: torch.int4, 8: torch.int8}[self.bits], grain)


GGUF_TYPES: dict[str, Rounding] = {"q8_0": q8_0, "q4_0": q4_0}


def check_package() -> None:
    """ConfigError where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError(
            "training.fake_quantization: int8 and int4 need torchao; q8_0 and q4_0 do not. Install it: "
            f"{how_to_install('qat')}."
        )


class _Straight(torch.autograd.Function):
    """The rounded weight, whose gradient is that of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounding: Rounding) -> Tensor:
        return rounding(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class RoundedLinear(nn.Linear):
    """A linear layer that multiplies by its rounded weight; ``rounding`` None: by the weight as it is."""

    rounding: Rounding | None = None

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, multiplied(self), self.bias)


class RoundedEmbedding(nn.Embedding):
    """An embedding that looks up its rounded weight; ``rounding`` None: the weight as it is."""

    rounding: Rounding | None = None

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, multiplied(self), self.padding_idx)


def multiplied(layer: Any) -> Tensor:
    """The weight by which a layer multiplies: rounded, where it rounds."""
    rounding = getattr(layer, "rounding", None)
    return layer.weight if rounding is None else _Straight.apply(layer.weight, rounding)


def fake_quantize(model: Any, name: str, *, group_size: int | None = None) -> None:
    """Has the linear layers of a model but its head round their weights as ``name``, in place.

    name: int8 or int4 (group_size: weights that share a scale, default 32 for int4, a row for int8), or q8_0 or q4_0,
    where embeddings and head are rounded to q8_0 as well. ConfigError for layers whose rows are not whole groups, for a
    model without linear layers, and without torchao for int8 and int4.
    """
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    layers = [
        (path, one) for path, one in model.named_modules() if type(one) is nn.Linear and one is not head
    ]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} has no linear layers that training.fake_quantization could round. Leave it out."
        )
    group = GGUF_BLOCK if name in GGUF_TYPES else group_size or (INT4_GROUP if name == "int4" else None)
    rounding = GGUF_TYPES[name] if name in GGUF_TYPES else TorchaoRounding(BITS[name], group)
    for path, layer in layers:
        _rounds(layer, RoundedLinear, rounding, group, path)
    if name not in GGUF_TYPES:
        return
    for path, layer, kind in (("embedding", table, RoundedEmbedding), ("head", head, RoundedLinear)):
        if type(layer) is not kind.__mro__[1]:
            raise ConfigError(
                f"the {path} of {type(model).__name__} is a {type(layer).__name__}, which {name} cannot round. Use "
                "int8 or int4."
            )
        _rounds(layer, kind, q8_0, GGUF_BLOCK, path)


def _rounds(layer: Any, kind: type[nn.Module], rounding: Rounding, group: int | None, path: str) -> None:
    width = layer.weight.shape[-1]
    if group is not None and width % group:
        raise ConfigError(
            f"training.fake_quantization: a row of {path} has {width} weights, not a multiple of {group}. Use int8, or "
            "int4 with a group_size that divides it."
        )
    layer.__class__ = kind
    layer.rounding = rounding


def rounded_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that round their weights."""
    return [one for one in model.modules() if isinstance(one, RoundedLinear | RoundedEmbedding)]


@contextmanager
def unrounded(model: nn.Module) -> Iterator[None]:
    """While it lasts the model multiplies by its weights as they are."""
    layers = [(one, one.rounding) for one in rounded_layers(model)]
    for layer, _ in layers:
        layer.rounding = None
    try:
        yield
    finally:
        for layer, rounding in layers:
            layer.rounding = rounding


@torch.no_grad()
def rounded(model: Any) -> Any:
    """A plain copy of a model, in fp32, whose weights are the rounded ones."""
    return plain(model, [layer.rounding(layer.weight) for layer in rounded_layers(model)])


def plain(model: Any, weights: list[Tensor] | None = None) -> Any:
    """A copy of a model in fp32 that rounds nothing; weights: in place of those of the layers that did, one each."""
    found = copy.deepcopy(model)
    for number, layer in enumerate(rounded_layers(found)):
        if weights is not None:
            layer.weight.data = weights[number]  # a tensor of two layers gets the same value twice
        layer.__class__ = type(layer).__mro__[1]
        del layer.rounding
    return found.float()


@torch.no_grad()
def integers(model: Any) -> Any:
    """A model that rounds as torchao does, with its integers and scales in place of the weights.

    RuntimeError where an integer times its scale is not what the model multiplies with.
    """
    from transformers import AutoModelForCausalLM, TorchAoConfig

    of = {name: layer for name, layer in model.named_modules() if isinstance(layer, RoundedLinear)}
    rounding: Any = next(iter(of.values())).rounding
    with tempfile.TemporaryDirectory() as folder, without_reports():
        plain(model).save_pretrained(folder)
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            quantization_config=TorchAoConfig(rounding.config()),
        )
    for name, layer in of.items():
        weight: Any = found.get_submodule(name).weight
        stored = weight.dequantize()
        trained: Any = layer.rounding
        if not torch.equal(stored, trained(layer.weight).to(stored.device)):
            raise RuntimeError(f"torchao stores {name} otherwise than it was trained")
    return found
