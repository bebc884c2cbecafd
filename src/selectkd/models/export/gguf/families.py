"""The architectures that GGUF files are written for: the settings of each, and how its weights differ from ours.

A setting that llama.cpp has no place for is refused by its name: a file that leaves it out would answer differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from selectkd.errors import ConfigError

Settings = dict[str, "int | float | bool | str"]

GEMMA3_PERIOD = 6
"""Every sixth layer of a Gemma 3 has full attention; llama.cpp has the number in its code."""
SMOLLM3_PERIOD = 4
"""Every fourth layer of a SmolLM3 has no rotary positions; likewise."""


@dataclass(frozen=True)
class Family:
    """A model type of transformers as llama.cpp knows it.

    arch: llama.cpp's name. settings: configuration -> keys behind ``arch.``. permuted: rows of q and k are
    interleaved, as llama.cpp rotates neighbours. norm_offset: what is added to the weights of norms.
    """

    arch: str
    settings: Callable[[Any], Settings]
    permuted: bool = False
    norm_offset: float = 0.0


def family_of(config: Any) -> Family:
    """The family of a configuration; ConfigError for another, naming those that can be written."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            f"GGUF files of {config.model_type} are not written here, only of {', '.join(sorted(FAMILIES))}. "
            "llama.cpp's convert_hf_to_gguf.py knows more: give it the folder of --to merged."
        )
    return family


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary settings of a configuration's full attention: rope_theta, rope_type and its parameters."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention") or found)


def head_width(config: Any) -> int:
    """Channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refuse(config: Any, setting: str, known: str) -> None:
    raise ConfigError(
        f"llama.cpp has no place for {setting} of {config.model_type}; it computes {known}. Export with --to merged."
    )


def _common(config: Any) -> Settings:
    """The settings that every family has."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    wanted = "gelu_pytorch_tanh" if config.model_type.startswith("gemma") else "silu"
    if activation not in ((wanted, "gelu") if wanted != "silu" else (wanted,)):
        _refuse(config, f"the activation {activation!r}", wanted)
    width = head_width(config)
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": width,
        "attention.value_length": width,
        "vocab_size": config.vocab_size,
        "rope.freq_base": float(rope_of(config).get("rope_theta", 10_000.0)),
    }


def _rope_scaling(config: Any, also: tuple[str, ...] = ()) -> Settings:
    """The settings of a longer context; ``llama3`` and ``longrope`` stand in tensors (``rope_tensors``)."""
    rope = rope_of(config)
    kind = rope.get("rope_type", "default")
    if kind in ("default", *also):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "type"}
        other = sorted(key for key, value in rope.items() if key not in known and value is not None)
        if other:
            _refuse(
                config, f"rope_parameters.{other[0]} = {rope[other[0]]}", "yarn with its default parameters"
            )
        return {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": int(rope["original_max_position_embeddings"]),
        }
    return _refuse(config, f"rope_type = {kind!r}", "default, linear or yarn positions") or {}


def _all_full(config: Any) -> None:
    """ConfigError where some layers have a sliding window."""
    if "sliding_attention" in (getattr(config, "layer_types", None) or ()):
        _refuse(config, "sliding_attention in layer_types", "full attention in every layer")


def _llama(config: Any) -> Settings:
    settings = _common(config) | _rope_scaling(config, also=("llama3",))
    window = getattr(config, "sliding_window", None)
    if window:  # within it, full attention is the same
        settings["context_length"] = min(config.max_position_embeddings, window)
    partial = rope_of(config).get("partial_rotary_factor") or 1.0
    return settings | {"rope.dimension_count": int(head_width(config) * partial)}


def _smollm3(config: Any) -> Settings:
    _all_full(config)
    expected = [int((layer + 1) % SMOLLM3_PERIOD != 0) for layer in range(config.num_hidden_layers)]
    if list(config.no_rope_layers) != expected:
        _refuse(
            config,
            "this no_rope_layers",
            f"every {SMOLLM3_PERIOD}th layer without positions, as the whole model has",
        )
    return _llama(config)


def _qwen(config: Any) -> Settings:
    _all_full(config)
    if config.model_type == "qwen3" and config.attention_bias:
        _refuse(config, "attention_bias", "no bias")
    return _common(config) | _rope_scaling(config)


def _phi3(config: Any) -> Settings:
    rope, width = rope_of(config), head_width(config)
    rotated = int(width * (rope.get("partial_rotary_factor") or 1.0))
    original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
    settings = _common(config) | _rope_scaling(config, also=("longrope",))
    return settings | {
        "rope.dimension_count": rotated,
        "rope.scaling.original_context_length": int(original),
        "attention.sliding_window": config.sliding_window or 0,
    }


def _gemma(config: Any) -> Settings:
    return _common(config) | _rope_scaling(config)


def _scaled_by_width(config: Any) -> None:
    if config.query_pre_attn_scalar != head_width(config):
        _refuse(config, f"query_pre_attn_scalar = {config.query_pre_attn_scalar}", "the width of a head")


def _windows(config: Any, period: int) -> None:
    """ConfigError unless every ``period``-th layer has full attention and the others a window."""
    expected = [
        "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
        for layer in range(config.num_hidden_layers)
    ]
    if list(config.layer_types) != expected:
        _refuse(
            config,
            "this order of layer_types",
            f"full attention in every {period}th layer, as the whole model has",
        )


def _gemma2(config: Any) -> Settings:
    _scaled_by_width(config)
    _windows(config, 2)
    return _gemma(config) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
        "attention.sliding_window": config.sliding_window,
    }


def _gemma3(config: Any) -> Settings:
    _scaled_by_width(config)
    _windows(config, GEMMA3_PERIOD)
    local = (config.rope_parameters.get("sliding_attention") or {}).get("rope_theta", 10_000.0)
    if config.attn_logit_softcapping is not None:
        _refuse(config, "attn_logit_softcapping", "no soft-cap in attention")
    settings = _gemma(config) | {"attention.sliding_window": config.sliding_window}
    settings["rope.freq_base_swa"] = float(local)
    if config.final_logit_softcapping is not None:
        settings["final_logit_softcapping"] = float(config.final_logit_softcapping)
    return settings


FAMILIES: dict[str, Family] = {
    "llama": Family("llama", _llama, permuted=True),
    "mistral": Family("llama", _llama, permuted=True),
    "smollm3": Family("smollm3", _smollm3, permuted=True),
    "qwen2": Family("qwen2", _qwen),
    "qwen3": Family("qwen3", _qwen),
    "phi3": Family("phi3", _phi3),
    "gemma": Family("gemma", _gemma, norm_offset=1.0),
    "gemma2": Family("gemma2", _gemma2, norm_offset=1.0),
    "gemma3_text": Family("gemma3", _gemma3, norm_offset=1.0),
}
