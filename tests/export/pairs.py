"""Tiny random students of every GGUF family, with tokenizers that were really trained."""

from __future__ import annotations

import json
from typing import Any

import torch
import transformers as hf
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from selectkd.cli.demo_pair import help_texts
from selectkd.models.export.student import Student
from selectkd.rollouts.generate import ends_of

WIDTH = 320
SIZES: dict[str, Any] = {
    "vocab_size": WIDTH, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 256, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2,
}  # fmt: skip
WIDE: dict[str, Any] = SIZES | {"head_dim": 32}
GEMMA: dict[str, Any] = WIDE | {"query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 6}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

CONFIGS: dict[str, Any] = {
    "llama": lambda: hf.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3": lambda: hf.LlamaConfig(**SIZES, attention_bias=True, rope_parameters=LLAMA3),
    "linear": lambda: hf.LlamaConfig(**WIDE, rope_parameters=LINEAR),
    "mistral": lambda: hf.MistralConfig(**SIZES),
    "smollm3": lambda: hf.SmolLM3Config(**SIZES),
    "qwen2": lambda: hf.Qwen2Config(**SIZES),
    "yarn": lambda: hf.Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": lambda: hf.Qwen3Config(**WIDE),
    "phi3": lambda: hf.Phi3Config(**SIZES),
    "gemma": lambda: hf.GemmaConfig(**WIDE),
    "gemma2": lambda: hf.Gemma2Config(**GEMMA),
    "gemma3": lambda: hf.Gemma3TextConfig(**GEMMA, final_logit_softcapping=20.0),
}


def tiny_model(name: str) -> Any:
    """A model whose vectors are random too, so that a norm or bias at the wrong place shows."""
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    centre = 0.0 if name.startswith("gemma") else 1.0
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, centre, 0.2)
    return model.eval()


def byte_level(kind: str = "smollm") -> Any:
    """A byte-level tokenizer that cuts text as SmolLM's does, or Qwen's, or GPT-2's."""
    inner = Tokenizer(models.BPE())
    cuts = {
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
        "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "qwen2": [
            pre_tokenizers.Split(Regex(QWEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    }
    inner.pre_tokenizer = pre_tokenizers.Sequence(cuts[kind])
    if kind == "qwen2":
        inner.normalizer = normalizers.NFC()
    inner.decoder = decoders.ByteLevel()
    _train(inner, pre_tokenizers.ByteLevel.alphabet())
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip
    made.add_tokens(["<think>"])
    made.chat_template = CHATML
    return made


def sentencepiece() -> Any:
    """A tokenizer with SentencePiece's shape: spaces as letters, bytes for what no token has."""
    inner = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<pad>", "<s>", "</s>", "<unk>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=WIDTH - 1,
        special_tokens=special,
        initial_alphabet=[],
        limit_alphabet=30,
        show_progress=False,
    )
    inner.train_from_iterator(help_texts()[:100], trainer)
    content = json.loads(inner.to_str())
    content["added_tokens"] = [one for one in content["added_tokens"] if not one["content"].startswith("<0x")]
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token="<unk>", additional_special_tokens=["<|im_end|>"],
    )  # fmt: skip
    return made


def _train(inner: Any, alphabet: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=WIDTH - 2, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(help_texts()[:100], trainer)


def student(model: Any, tokenizer: Any) -> Student:
    return Student(model, tokenizer, "a tiny model", ends_of)
