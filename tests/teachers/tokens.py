"""Two small byte-level tokenizers that cut the same text differently, and models over them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = (
    "the student proposes and the teacher verifies; a token that is not verified teaches nothing. ",
    "tokens, tokenizers and tokenization: 1234 spans of the same text, café au lait. ",
    "def verify(token):\n    return token in teacher.best(5)\n",
)
END = "<|end|>"


def byte_level(size: int, *, end: str = END, text: tuple[str, ...] = TEXT) -> Any:
    """A byte-level BPE of ``size`` tokens, trained on three lines."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(list(text) * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=end)


def sentence_piece(words: tuple[str, ...] = ("▁the", "▁token", "s", "▁", "t", "e", "a")) -> Any:
    """A SentencePiece-style BPE with byte fallback, a start token and a few pieces."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    inner = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True, fuse_unk=True
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="</s>", bos_token="<s>", pad_token="</s>"
    )


def model_for(
    tokenizer: Any, seed: int, *, dtype: torch.dtype = torch.float64, rows: int | None = None
) -> Any:
    """A tiny Llama with a head for the tokenizer, or of ``rows`` rows."""
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)
