"""Tiny random pairs and texts for the training room."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from selectkd.data.collate import collate
from selectkd.data.render import Example

VOCABULARY = 64


def tiny_llama(seed: int, *, layers: int = 2, hidden: int = 32, dtype: torch.dtype = torch.float32) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).to(dtype)


def texts(count: int, *, seed: int = 0, streams: int = 2) -> list[Example]:
    """Samples of 6 to 19 tokens, of which the last 2 to 12 are supervised."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, size: tuple[int, ...] = ()) -> Any:
        return torch.randint(low, high, size, generator=generator)

    made = []
    for index in range(count):
        prompt, completion = int(draw(4, 8)), int(draw(2, 13))
        ids = draw(3, VOCABULARY, (prompt + completion,)).tolist()
        made.append(
            Example(
                input_ids=ids,
                completion=[False] * prompt + [True] * completion,
                stream=index % streams,
                origin=f"made:{index + 1}",
            )
        )
    return made


def padded(examples: list[Example], size: int) -> list[Any]:
    return [collate(examples[i : i + size], pad_id=0) for i in range(0, len(examples), size)]
