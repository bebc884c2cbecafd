"""Whether samples may share a row of a model: every token must see its own sample alone, from its first token on."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from selectkd.errors import ConfigError
from selectkd.models.load import _locate
from selectkd.models.shape import config_of

WHOLE = (
    "full_attention",
    "sliding_attention",
    "attention",
    "full",
    "global",
    "moe",
    "mlp",
    "dense",
    "sparse",
)
"""Kinds of layers that see a sample as it is alone (``models.forward``)."""
CHUNKED = "chunked_attention"
"""Layers whose chunks some versions of transformers count from the start of a row."""
STATE = (
    "mamba", "ssm", "rwkv", "xlstm", "jamba", "bamba", "zamba", "recurrent", "lfm2", "falcon_h1", "nemotron_h",
    "granitemoehybrid", "minimax", "kimi", "qwen3_next", "qwen3_5", "olmo_hybrid", "plamo", "hgrn", "retnet", "gla",
)  # fmt: skip
"""Parts of the names of models that carry a state from token to token, by convolution or recurrence."""
PLACES = ("bloom", "mpt", "opt", "xglm", "biogpt", "t5", "ctrl", "xlnet", "transfo")
"""Models that count places from the attention mask or have a bias by distance: a packed row has neither."""
PADDING_MASK_ONLY = ("doge", "openai-gpt", "xlm", "bert-generation", "cpmant", "falcon", "gpt_oss")
"""Models that take a padding mask alone, ignore the mask they are given, or make theirs without looking at places."""


def check_packing(
    spec: str | os.PathLike[str], length: int, *, role: str, revision: str | None = None
) -> None:
    """ConfigError where several samples in a row of ``length`` tokens would change the model's results, with the cause.

    Reads its configuration alone. A sliding window may be shorter than the row: it ends where its sample begins.
    """
    folder, _ = _locate(spec, revision, None, weights=False)
    if folder.is_file():
        return  # llama and its kin: what a GGUF file is converted to
    config = config_of(folder)
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
        chunk = getattr(text, "attention_chunk_size", None) if kind == CHUNKED else None
        if chunk is not None and chunk < length:
            return f"{_layers(kinds, kind)} whose chunks have {chunk} tokens, and a row has {length}"
        if kind not in (*WHOLE, CHUNKED):
            return f"{_layers(kinds, kind)}, which are not known to keep samples apart"
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


def _layers(kinds: Sequence[str], kind: str) -> str:
    """The layers of a kind by their numbers, the first three."""
    numbers = [str(number) for number, one in enumerate(kinds) if one == kind]
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    word = "layer" if len(numbers) == 1 else "layers"
    return f"has {kind} in {word} {', '.join(numbers[:3])}{more}"
