"""A tiny random model of every causal model type that transformers has, from its own default configuration."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
import transformers as hf
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 64
PARAMETERS = 4_000_000
"""Larger models are not built: their configuration has a size that no rule below knows."""

SIZES: list[tuple[str, Any]] = [  # the first pattern that a key matches gives its size
    (r"^(pad|bos|eos|decoder_start|forced_bos|forced_eos|sep|cls|mask|eod|unk)_token_id$", 1),
    (r"(^|_)vocab_size(_per_layer_input)?$|^audio_vocab_size$|^codebook_size$", VOCABULARY),
    (r"key_value_heads$|kv_heads$|^kv_n_heads$|linear_num_key_heads$", 2),
    (r"heads?$", 4),
    (r"mamba_d_head$|mamba_head_?dim$", 16),
    (r"n_?groups?$|topk_group$|n_expert_group$", 1),
    (r"state_size$|d_state$|chunk_size$", 8),
    (r"experts_per_tok(en)?$|moe_topk$|moe_top_k$|moe_k$", 2),
    (r"num_shared_experts$|n_shared_experts$|moe_num_shared_experts$", 1),
    (r"experts$", 4),
    (r"lora_rank$|laurel_rank$|dt_rank$|time_step_rank$|hc_lowrank$", 8),
    (r"qk_rope_head_dim$|qk_nope_head_dim$", 4),
    (r"head_?dim$|d_kv$|^attention_head_size$|^kv_channels$|^dim_head$|^d_head$", 8),
    (r"sliding_window(_size)?$|window_size$|^local_attention$|attention_chunk_size$", 16),
    (r"intermediate_size(_mlp)?$|ffn_dim$|d_ff$|^dff$|^dim_ff$|^d_inner$|ffn_hidden_size$|feed_forward_size$", 48),
    (r"num_.*hidden_layers$|^n_layers?$|^num_.*layers$|(en|de)coder_layers$|^num_blocks$|num_layers_per_stack$", 4),
    (r"hidden_size$|d_model$|^n_embd$|embedding_size$|embedding_dim$|emb_dim$|^lru_width$|embed_proj_dim$", 32),
    (r"hidden_size_per_layer_input$", 8),
    (r"max_position_embeddings$|n_positions$|max_seq_len$|context_length$|max_target_positions$", 256),
]  # fmt: skip

OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "deepseek_v2": {"topk_group": 1, "n_group": 1, "moe_layer_freq": 1},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_expand": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16,
                         "layer_types": ["mamba", "attention", "mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True},
    "xlnet": {"d_head": 8},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
"""What a type's own arithmetic asks of its sizes."""


def tiny_config(model_type: str) -> Any:
    """The type's default configuration with every size made small."""
    return _small(CONFIG_MAPPING[model_type], model_type)


def _small(kind: Any, model_type: str) -> Any:
    default = kind()
    given: dict[str, Any] = {}
    for key in {*inspect.signature(kind).parameters, *vars(default)}:
        value = getattr(default, key, None)
        if key in getattr(kind, "sub_configs", {}):
            if isinstance(value, hf.PreTrainedConfig):
                given[key] = _small(type(value), value.model_type)
        elif (isinstance(value, int) and not isinstance(value, bool)) or (
            value is None and key == "head_dim"
        ):
            size = next((size for pattern, size in SIZES if re.search(pattern, key)), None)
            if size is not None:
                given[key] = size
    if "kv_lora_rank" in given:  # as many keys as queries, made from one vector
        given["num_key_value_heads"] = 4
    given.update(OWN.get(model_type, {}))
    known = set(inspect.signature(kind).parameters)
    return kind(
        **{key: value for key, value in given.items() if key in known or key in OWN.get(model_type, {})}
    )


def tiny_model(model_type: str, *, std: float = 0.2) -> Any:
    """A model of the type with large random weights, so that a scale which is missed shows."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in hf.AutoModelForCausalLM.from_config(config).parameters())
    if size > PARAMETERS:
        raise ValueError(f"{model_type} has {size:,} parameters")
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=std)
    return model.eval()
