"""Tiny random pairs and texts for the training room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from selectkd.data.collate import collate
from selectkd.data.example import Example

VOCABULARY = 64
WORDS = [f"w{i}" for i in range(VOCABULARY - 4)]


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


def tiny_tokenizer(words: list[str] = WORDS) -> Any:
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def write_pair(root: Path, teacher: Any) -> None:
    """A teacher, a student and 24 texts on disk."""
    for name, model in (("teacher", teacher), ("student", tiny_llama(2))):
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    with (root / "text.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(24):
            words = [WORDS[i] for i in torch.randint(len(WORDS), (12,), generator=generator).tolist()]
            file.write(
                json.dumps({"prompt": " ".join(words[:5]), "completion": " " + " ".join(words[5:])}) + "\n"
            )


def recipe_of(root: Path, *, data: Any = None, **sections: Any) -> dict[str, Any]:
    """A recipe of the pair that ``write_pair`` left, as plain data; ``data`` joins its section, others are as given."""
    source = {"sources": [{"path": str(root / "text.jsonl"), "name": "made"}]}
    return {
        "teacher": {"model": str(root / "teacher")},
        "student": {"model": str(root / "student")},
        "data": {**source, **(data or {})},
        **sections,
    }
