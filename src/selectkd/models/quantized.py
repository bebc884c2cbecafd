"""Models whose linear layers are stored in few bits (bitsandbytes): how they load, and how they become whole again.

Weights W [o, i] in 4 bits lie as codes of blocks of 64, each with a scale; under double quantization the scales lie in
8 bits themselves, with an fp32 scale for each 256 of them.
"""

# torch types an attribute of a module as Tensor | Module; what these functions read of one is neither
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false, reportArgumentType=false
from __future__ import annotations

import copy
import importlib.util
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError
from selectkd.models.shape import without_reports

FOUR, EIGHT = "bitsandbytes-4bit", "bitsandbytes-8bit"
QUANTIZATIONS = (FOUR, EIGHT)
BLOCK, SCALES = 64, 256
"""Weights of a scale, and scales of a second scale."""


@dataclass(frozen=True)
class BitsAndBytes:
    """How weights are stored: name of ``QUANTIZATIONS``; of 4 bits also the values (nf4 or fp4), whether scales are
    quantised, and the dtype of products, default that of the other weights. device: default an accelerator where there
    is one.
    """

    name: str
    type: str = "nf4"
    double: bool = False
    compute_dtype: torch.dtype | None = None
    device: torch.device | str | None = None

    def options(self, dtype: torch.dtype) -> dict[str, Any]:
        """Arguments of transformers' ``from_pretrained``; dtype: of the weights that stay whole."""
        where = {} if self.device is None else {"device_map": {"": self.device}}
        if self.name == EIGHT:
            return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), **where}
        four = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=self.type, bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=self.compute_dtype or dtype,
        )  # fmt: skip
        return {"quantization_config": four, **where}


def check_quantization(quantization: str | BitsAndBytes | None) -> None:
    """ConfigError for a way to quantise that is not known, or without the package that does it."""
    if quantization is None:
        return
    name = quantization if isinstance(quantization, str) else quantization.name
    if name not in QUANTIZATIONS:
        raise ConfigError(f"quantization = {name!r} is not known. Use one of: {', '.join(QUANTIZATIONS)}.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization = {name!r} needs bitsandbytes. Install it: {how_to_install('qlora')}."
        )


def options_of(quantization: str | BitsAndBytes | None, dtype: torch.dtype) -> dict[str, Any]:
    """``BitsAndBytes.options`` of a name or of all settings; empty for None. Raises as ``check_quantization``."""
    check_quantization(quantization)
    if quantization is None:
        return {}
    return (BitsAndBytes(quantization) if isinstance(quantization, str) else quantization).options(dtype)


def quantized(model: Any, quantization: BitsAndBytes) -> nn.Module:
    """A model in memory as ``load_model`` with ``quantization`` would load it, by way of a temporary folder."""
    check_quantization(quantization)
    dtype, named = model.dtype, model.config._name_or_path
    with tempfile.TemporaryDirectory() as folder, without_reports():
        model.save_pretrained(folder)
        found = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation=model.config._attn_implementation, local_files_only=True,
            **options_of(quantization, dtype),
        )  # fmt: skip
    found.config._name_or_path = named
    return unpacked(found)


def unpacked(model: Any) -> Any:
    """A model whose 4-bit layers stay as they are on every processor.

    On one with AVX-512 for bf16, bitsandbytes 0.50 rearranges a layer at its first evaluation and rounds its scales to
    bf16, and fails at rows that are shorter than a block.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return model


def is_quantized(model: Any) -> bool:
    """Whether a model, in an adapter's wrapper or not, has layers of few bits."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return bool(getattr(plain, "is_quantized", False))


@torch.no_grad()
def dequantized(model: Any, dtype: torch.dtype) -> nn.Module:
    """The plain model in main memory whose weights are what a 4-bit base and its adapters multiply with, as ``dtype``.

    W' = dequantized W + (alpha / r) B A, summed in fp32; the model itself is left as it is.
    """
    from bitsandbytes.nn import Linear4bit  # pyright: ignore[reportMissingImports]

    merged: dict[str, nn.Module] = {}
    for name, layer in model.named_modules():
        base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        if isinstance(base, Linear4bit) and not any(name.startswith(f"{above}.") for above in merged):
            merged[name] = _whole_layer(base, _deltas(layer), dtype)
    found = _without(model, merged)
    if hasattr(found, "merge_and_unload"):
        found = found.merge_and_unload()
    for mark in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
        vars(found).pop(mark, None)
    del found.config.quantization_config
    return found.to(device="cpu", dtype=dtype)


def _whole_layer(base: Any, deltas: Iterator[Tensor], dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit  # pyright: ignore[reportMissingImports]

    weight = dequantize_4bit(base.weight.data, base.weight.quant_state).float()  # [o, i]
    for delta in deltas:
        weight = weight + delta.to(weight)
    layer = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.to("cpu", dtype), requires_grad=False)
    if base.bias is not None:
        layer.bias = nn.Parameter(base.bias.detach().to("cpu", dtype), requires_grad=False)
    return layer


def _deltas(layer: Any) -> Iterator[Tensor]:
    for name in getattr(layer, "active_adapters", ()):
        if name in layer.lora_A:
            yield layer.get_delta_weight(name)


def _without(model: Any, layers: dict[str, nn.Module]) -> Any:
    """A copy of the model with ``layers`` in place of its own of those names, which are not copied."""
    return copy.deepcopy(model, {id(model.get_submodule(name)): layer for name, layer in layers.items()})


def stored_bytes(model: Any, double: bool, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of a model, on the meta device or not, as its 4-bit form is stored; what is not quantised is ``dtype``."""
    small = {id(p): p for p in quantized_weights(model)}
    once = {id(p): p for p in [*model.parameters(), *model.buffers()] if id(p) not in small}
    total = sum(
        p.numel() * (dtype.itemsize if p.is_floating_point() else p.element_size()) for p in once.values()
    )
    for weight in small.values():
        scales = -(-weight.numel() // BLOCK)
        total += -(-weight.numel() // 2) + (scales + 4 * -(-scales // SCALES) if double else 4 * scales)
    return total


def quantized_weights(model: Any) -> list[nn.Parameter]:
    """The weights that 4 bits store: those of linear layers but the head."""
    head = model.get_output_embeddings()
    return [module.weight for module in model.modules() if type(module) is nn.Linear and module is not head]
