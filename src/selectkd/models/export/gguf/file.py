"""Writing a GGUF file: settings, vocabulary and weights of a student, one tensor after the other."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, LlamaFileType

from selectkd.models.export.gguf.families import Settings, family_of
from selectkd.models.export.gguf.tensors import longrope_attention, quantized, stored_as, tensors_of
from selectkd.models.export.gguf.vocabulary import Vocabulary, vocabulary_of
from selectkd.models.head import head_of

FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32, "f16": LlamaFileType.MOSTLY_F16, "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0, "q5_1": LlamaFileType.MOSTLY_Q5_1, "q4_0": LlamaFileType.MOSTLY_Q4_0,
}  # fmt: skip
QUANTIZATION_VERSION = 2
"""Of ggml's blocks, which loaders compare."""
STRIPS_BEHIND = re.compile("phi-?3", re.IGNORECASE)
"""llama.cpp takes spaces behind special tokens away where a model's name has this in it."""


def write_gguf(
    model: Any, tokenizer: Any, path: Path, *, kind: str, ends: Collection[int], name: str
) -> tuple[Vocabulary, dict[str, int]]:
    """Writes the file and returns (its vocabulary, how many tensors it holds in each number format).

    kind: one of ``tensors.TYPES``. ends: ids that end a text. name: the model's name in the file. ConfigError for what
    GGUF or llama.cpp has no place for, before a byte is written.
    """
    family = family_of(model.config)
    settings = family.settings(model.config)
    vocabulary = vocabulary_of(tokenizer, head_of(model).width, ends)
    factor = longrope_attention(model.config)
    if factor is not None:
        settings["rope.scaling.attn_factor"] = factor
    writer = GGUFWriter(path, family.arch)
    writer.add_type("model")
    writer.add_name(_name(name, tokenizer))
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(QUANTIZATION_VERSION)
    _add(writer, {f"{family.arch}.{key}": value for key, value in settings.items()})
    _add_vocabulary(writer, vocabulary)
    formats: Counter[str] = Counter()
    for tensor_name, tensor in tensors_of(model, family):
        stored = stored_as(tensor_name, tensor, kind)
        formats[stored.name.lower()] += 1
        writer.add_tensor(tensor_name, quantized(tensor, stored), raw_dtype=stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return vocabulary, dict(formats)


def _name(name: str, tokenizer: Any) -> str:
    """The name in the file, which llama.cpp reads for Phi 3: its special tokens swallow the space behind them."""
    strips = any(one.rstrip for one in tokenizer.added_tokens_decoder.values())
    plain = STRIPS_BEHIND.sub("phi", name)
    return f"Phi-3 {plain}" if strips else plain


def _add(writer: GGUFWriter, settings: Settings) -> None:
    for key, value in settings.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_string(key, value)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    for name, i in vocabulary.special.items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(vocabulary.add_eos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)
