"""Whether samples may share a row of a model: every token must see its own sample alone, from its first token on."""

from __future__ import annotations

import inspect
import os
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from selectkd.errors import ConfigError
from selectkd.models.load import _locate
from selectkd.models.shape import config_of

WHOLE = ("full_attention", "attention", "full", "global", "moe", "mlp", "dense", "sparse")
"""Kinds of layers that a mask keeps within a sample."""
WINDOWS = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
STATE = (
    "mamba", "ssm", "rwkv", "xlstm", "jamba", "bamba", "zamba", "recurrent", "lfm2", "falcon_h1", "nemotron_h",
    "granitemoehybrid", "minimax", "kimi", "qwen3_next", "qwen3_5", "olmo_hybrid", "plamo", "hgrn", "retnet", "gla",
)  # fmt: skip
"""Parts of the names of models that carry a state from token to token, by convolution or recurrence."""
PLACES = ("bloom", "mpt", "opt", "xglm", "biogpt", "t5", "ctrl", "xlnet", "transfo")
"""Models that count places from the attention mask or have a bias by distance: a packed row has neither."""
PADDING_MASK_ONLY = ("doge", "openai-gpt", "xlm", "bert-generation", "cpmant")
"""Models that take a padding mask alone, or ignore the mask they are given."""


def check_packing(
    spec: str | os.PathLike[str],
    length: int,
    *,
    role: str,
    revision: str | None = None,
    attention: str | None = None,
) -> None:
    """ConfigError where several samples in a row of ``length`` tokens would change the model's results, with the cause.

    Reads its configuration alone. attention: the recipe's attn_implementation, None for the configuration's.
    """
    folder, _ = _locate(spec, revision, None, weights=False)
    if folder.is_file():
        return  # llama and its kin: what a GGUF file is converted to
    config = config_of(folder)
    kind = str(attention or config._attn_implementation)
    if kind.startswith("flash"):
        raise ConfigError(
            f"data.packing keeps samples apart by a mask, and {role} {spec} asks for {kind}, which takes none. Set "
            "attn_implementation to sdpa, eager or flex_attention, or data.packing to false."
        )
    found = problem(config, length)
    if found is not None:
        raise ConfigError(
            f"data.packing: {role} {spec} ({config.model_type}) {found}, so samples in one row would not be read as "
            "they are alone. Set data.packing to false; data.bucket: true saves padding too."
        )


def problem(config: Any, length: int) -> str | None:
    """The cause in a configuration why samples cannot share a row of ``length`` tokens; None where they can."""
    text = config.get_text_config(decoder=True)
    kinds = [str(kind) for kind in getattr(text, "layer_types", None) or ()]
    kinds += [str(kind) for kind in getattr(text, "layers_block_type", None) or ()]
    for kind in dict.fromkeys(kinds):
        if kind in WINDOWS:
            window = getattr(text, WINDOWS[kind], None)
            if window is not None and window < length:
                return f"has layers of {kind} with a window of {window} tokens, and a row has {length}"
        elif kind not in WHOLE:
            return f"has layers of {kind}, which are not known to keep samples apart"
    window = getattr(text, "sliding_window", None)
    if (
        not kinds
        and isinstance(window, int)
        and getattr(text, "use_sliding_window", True)
        and window < length
    ):
        return f"has a sliding window of {window} tokens, and a row has {length}"
    mapping = MODEL_FOR_CAUSAL_LM_MAPPING
    chosen = mapping.get(type(text), None) or mapping.get(type(config), None)
    classes = chosen if isinstance(chosen, tuple) else (chosen,)
    name = str(text.model_type)
    stateful = any(getattr(each, "_is_stateful", False) for each in classes)
    if stateful or (not kinds and any(part in name for part in STATE)):
        return "carries a state from token to token"
    if getattr(text, "alibi", False) or any(name.startswith(part) for part in PLACES):
        return "takes places from the attention mask"
    if name in PADDING_MASK_ONLY:
        return "takes no mask that keeps samples apart"
    if any(each and "position_ids" not in inspect.signature(each.forward).parameters for each in classes):
        return "counts places from the start of a row"
    return None
