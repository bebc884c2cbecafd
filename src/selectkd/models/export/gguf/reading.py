"""The way back from a GGUF file, for the check of an export: transformers reads it where it knows the family.

What transformers does not read of a file (settings of longer contexts, say) is taken from the student, and what it does
read is compared with the student.
"""

from __future__ import annotations

import contextlib
import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize, get_tensor_name_map
from torch import Tensor

from selectkd.errors import IntegrityError
from selectkd.models.export.exported import Exported, encoder, model_logits
from selectkd.models.export.gguf.families import Family, family_of, rope_of
from selectkd.models.export.gguf.vocabulary import SPACE
from selectkd.models.load import Loaded
from selectkd.models.shape import without_reports

ENDS = ("eos", "eot", "eom")
READ_BY_TRANSFORMERS = frozenset({"llama", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text"})
"""Model types that transformers 5.23 reads from GGUF; the weights of the others are read here."""


def read_gguf(path: Path, student: Loaded) -> Exported:
    """The model in a file, its weights taken back to fp32; IntegrityError where weights are missing."""
    reader = GGUFReader(path)
    source: Any = student.model
    family = family_of(source.config)
    own = source.config.model_type not in READ_BY_TRANSFORMERS
    model = _read_here(reader, source, family) if own else _read_by_transformers(path, source)
    fields = {
        name: field.contents() for name, field in reader.fields.items() if name.startswith("tokenizer.")
    }
    tokenizer = _tokenizer(path, fields)
    ends = [fields.get(f"tokenizer.ggml.{name}_token_id") for name in ENDS]
    return Exported(
        encode=_encoder(tokenizer, fields),
        logits=model_logits(model),
        ends=frozenset(i for i in ends if i is not None),
        template=fields.get("tokenizer.chat_template"),
        read_by="selectkd" if own else "transformers",
        model=model,
        differences=_settings(reader, family, source.config)
        + ([] if own else _read_settings(path, source.config)),
    )


def _encoder(tokenizer: Any, fields: dict[str, Any]) -> Any:
    """Text to ids with the ids that the file puts around a text."""
    plain = encoder(tokenizer)

    def around(name: str) -> list[int]:
        return (
            [fields[f"tokenizer.ggml.{name}_token_id"]]
            if fields.get(f"tokenizer.ggml.add_{name}_token")
            else []
        )

    before, behind = around("bos"), around("eos")
    return lambda text, special: [*before, *plain(text, False), *behind] if special else plain(text, False)


def _tokenizer(path: Path, fields: dict[str, Any]) -> Any:
    """The tokenizer as transformers reads it, spaces of a SentencePiece one as llama.cpp takes them: where the file
    says so, one before each stretch of text between special tokens.
    """
    from tokenizers import normalizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        convert_gguf_tokenizer,
        get_gguf_tokenizer,
    )

    try:
        with without_reports():
            architecture, parts, _ = get_gguf_tokenizer(str(path))
            backend, _ = convert_gguf_tokenizer(architecture, parts)
    except Exception as error:  # the tokenizers library raises Exception itself
        raise IntegrityError(f"{path.name} holds no tokenizer that can be read: {error}.") from error
    if fields["tokenizer.ggml.model"] == "llama":
        before = [normalizers.Prepend(SPACE)] if fields.get("tokenizer.ggml.add_space_prefix", True) else []
        backend.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", SPACE)])
        backend.pre_tokenizer = None
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def _read_by_transformers(path: Path, student: Any) -> Any:
    from transformers import GgufConfig

    config = copy.deepcopy(student.config)  # transformers notes in it how the weights were stored
    with without_reports(), contextlib.redirect_stderr(io.StringIO()):  # a bar that cannot be switched off
        model, report = type(student).from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, local_files_only=True,
            quantization_config=GgufConfig(dequantize=True), output_loading_info=True,
        )  # fmt: skip
    missing = sorted(report["missing_keys"])
    if missing:
        raise IntegrityError(f"{path} lacks {missing[0]} and {len(missing) - 1} more weights.")
    return model.eval()


def _read_here(reader: GGUFReader, student: Any, family: Family) -> Any:
    """A model of the student's class with the weights of a file."""
    from gguf import MODEL_ARCH_NAMES

    config = student.config
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.arch)
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    found = {tensor.name: tensor for tensor in reader.tensors}
    model = type(student)(config)
    for name, tensor in model.state_dict().items():
        stored = found.get(names.get_name(name, try_suffixes=(".weight", ".bias")) or "")
        if stored is None and name == "lm_head.weight":
            stored = found["token_embd.weight"]
        if stored is None:
            raise IntegrityError(f"the GGUF file lacks {name}.")
        value = torch.from_numpy(np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32))
        if family.permuted and ".q_proj." in name:
            value = _separated(value, config.num_attention_heads)
        elif family.permuted and ".k_proj." in name:
            value = _separated(value, config.num_key_value_heads)
        elif name.endswith("norm.weight"):
            value = value - family.norm_offset
        tensor.copy_(value.reshape(tensor.shape))
    return model.eval()


def _separated(rows: Tensor, heads: int) -> Tensor:
    """The inverse of ``tensors.interleaved``, by its indices: row 2 i of a head is channel i, row 2 i + 1 i + half."""
    half = rows.shape[0] // heads // 2
    channel = torch.arange(2 * half)
    within = torch.where(channel < half, 2 * channel, 2 * (channel - half) + 1)
    return rows[(torch.arange(heads)[:, None] * 2 * half + within).flatten()]


def _settings(reader: GGUFReader, family: Family, config: Any) -> list[str]:
    """The settings of a file that are not those that the family writes of this configuration."""
    differ = []
    for key, value in family.settings(config).items():
        field = reader.fields.get(f"{family.arch}.{key}")
        stored = None if field is None else field.contents()
        same = (
            np.float32(value) == np.float32(stored)
            if isinstance(value, float) and stored
            else value == stored
        )
        if not same:
            differ.append(f"{family.arch}.{key} is {stored} in the file and {value} in the student")
    return differ


def _read_settings(path: Path, config: Any) -> list[str]:
    """The settings that transformers reads of a file otherwise than the student has them."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    differ = []
    for key, value in load_gguf_checkpoint(str(path))["config"].items():
        expected = rope_of(config).get("rope_theta") if key == "rope_theta" else getattr(config, key, None)
        if key in ("model_type", "_model_name_or_path") or key.endswith("_token_id") or expected is None:
            continue
        near = isinstance(value, float) and np.float32(value) == np.float32(expected)
        if not near and value != expected:
            differ.append(f"{key} reads as {value} from the file and is {expected} in the student")
    return differ
