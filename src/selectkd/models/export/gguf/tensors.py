"""The weights of a model as a GGUF file holds them: names, order of rows, and the number format of each.

n rows, c columns; a block is 32 numbers of a row that share a scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, get_tensor_name_map
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.models.export.gguf.families import Family, head_width, rope_of

BLOCK = 32
HALF_MOST = 65_504
TYPES = {
    "f32": GGMLQuantizationType.F32, "f16": GGMLQuantizationType.F16, "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0, "q5_1": GGMLQuantizationType.Q5_1, "q4_0": GGMLQuantizationType.Q4_0,
}  # fmt: skip
ENDS = ("token_embd.weight", "output.weight")
"""Embedding and head: below eight bits they cost more than all layers, so q5_1 and q4_0 keep them in q8_0."""


def tensors_of(model: Any, family: Family) -> Iterator[tuple[str, Tensor]]:
    """(name, fp32 tensor) of each weight under llama.cpp's names, a tied head once; ConfigError for a name that
    llama.cpp has no place for.
    """
    config = model.config
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and tied:
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ConfigError(
                f"llama.cpp's {family.arch} has no place for the weight {name}. Export with --to merged."
            )
        value = tensor.detach().float().cpu()
        if family.permuted and name.endswith(("q_proj.weight", "q_proj.bias")):
            value = interleaved(value, config.num_attention_heads)
        elif family.permuted and name.endswith(("k_proj.weight", "k_proj.bias")):
            value = interleaved(value, config.num_key_value_heads)
        elif name.endswith("norm.weight"):
            value = value + family.norm_offset
        yield found, value
    yield from rope_tensors(config)


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows of q or k in the order of llama.cpp's rotation: channel i of a head beside channel i + half.

    rows [n, ...], n = heads x channels. transformers rotates (i, i + half), llama.cpp's ``llama`` (2 i, 2 i + 1).
    """
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def rope_tensors(config: Any) -> Iterator[tuple[str, Tensor]]:
    """The factors by which frequencies are divided for a longer context: of Llama 3, and of Phi 3's longrope."""
    rope = rope_of(config)
    kind, width = rope.get("rope_type"), head_width(config)
    if kind == "llama3":
        yield "rope_freqs.weight", llama3_factors(rope, width)
    elif kind == "longrope":
        yield "rope_factors_long.weight", torch.tensor(rope["long_factor"], dtype=torch.float32)
        yield "rope_factors_short.weight", torch.tensor(rope["short_factor"], dtype=torch.float32)


def llama3_factors(rope: dict[str, Any], width: int) -> Tensor:
    """1 for short wavelengths, ``factor`` for long ones, and a smooth path between; [width / 2].

    Source: Llama 3.1's code, as in transformers' ``_compute_llama3_parameters``.
    """
    old = rope["original_max_position_embeddings"]
    low, high = old / rope["low_freq_factor"], old / rope["high_freq_factor"]
    factors = []
    for i in range(0, width, 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / width)
        smooth = (old / length - rope["low_freq_factor"]) / (
            rope["high_freq_factor"] - rope["low_freq_factor"]
        )
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < high else rope["factor"] if length > low else between)
    return torch.tensor(factors, dtype=torch.float32)


def longrope_attention(config: Any) -> float | None:
    """By how much attention is scaled under longrope; None without it."""
    rope = rope_of(config)
    if rope.get("rope_type") != "longrope":
        return None
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    scale = config.max_position_embeddings / original
    return math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1.0


def stored_as(name: str, tensor: Tensor, kind: str) -> GGMLQuantizationType:
    """The number format of one tensor: vectors in f32; rows that make no whole blocks in f16."""
    if tensor.ndim == 1 or kind == "f32":
        return GGMLQuantizationType.F32
    wanted = "q8_0" if name in ENDS and kind in ("q5_1", "q4_0") else kind
    if wanted.startswith("q") and tensor.shape[-1] % BLOCK:
        return GGMLQuantizationType.F16
    return TYPES[wanted]


def quantized(tensor: Tensor, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of a tensor in a format, by the gguf package's own quantisers; ConfigError where a number does not
    fit.
    """
    from gguf import quants

    values = tensor.contiguous().numpy()
    if kind == GGMLQuantizationType.F16 and np.abs(values).max() > HALF_MOST:
        raise ConfigError(f"a weight is too large for f16 ({HALF_MOST:,} at most). Use --type bf16 or f32.")
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return values.astype(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    return quants.quantize(values, kind)
