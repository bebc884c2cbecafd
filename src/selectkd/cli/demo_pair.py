"""What ``selectkd demo`` distils: the real pair of recipes/demo.yaml, or a tiny pair made on the spot.

The tiny pair needs no download: its teacher is a four-layer Llama over bytes, trained for some seconds on the help
texts that come with Python; its student is that teacher with half of its layers.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from selectkd.config.shipped import shipped_recipe
from selectkd.errors import ConfigError

PROMPTS = (
    "What is the capital of France?",
    "Give me three tips for staying healthy.",
    "Write a short sentence about the sea.",
)
TINY_STEPS = 200
"""Steps of the tiny teacher: about 10 seconds on two cores, after which it spells English words."""


def real_recipe() -> tuple[Path, Path]:
    """(the demo's recipe, the folder its paths start from); ConfigError where its text is not there yet.

    The folder is the checkout, or the working directory where selectkd is installed as a wheel.
    """
    recipe = shipped_recipe("demo")
    root = recipe.parents[1] if (recipe.parents[1] / "Makefile").is_file() else Path.cwd()
    text = root / ".cache" / "demo" / "alpaca_en_demo.json"
    if not text.is_file():
        raise ConfigError(
            f"the demo needs {text}, which is not there. Run `make demo` in a checkout of selectkd, which fetches it. "
            "Or take data/alpaca_en_demo.json from llamafactory 0.9.5's source distribution. "
            "Or run `selectkd demo --quick`, which needs no download."
        )
    return recipe, root


def quick_recipe(folder: Path) -> Path:
    """Makes the tiny teacher and its text in ``folder`` and returns the path of a recipe that distils it."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = help_texts()
    teacher = folder / "teacher"
    train_tiny_teacher(texts, teacher)
    with (folder / "text.jsonl").open("w", encoding="utf-8") as out:
        out.writelines(json.dumps({"prompt": t[:40], "completion": t[40:]}) + "\n" for t in texts[:240])
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        textwrap.dedent(
            f"""\
            teacher: {{model: {json.dumps(str(teacher))}}}
            student: {{from_teacher: {{layers: 2, choose: measured}}}}
            data:
              sources: [{{path: {json.dumps(str(folder / "text.jsonl"))}, name: help}}]
              evaluation: 0.1
            objective:
              divergence: {{name: forward_kl}}
              verifier: {{name: greedy_topk, k: 5}}
              beta: {{start: 1.0, end: 0.01, until_tar: 0.9}}
            training:
              output_dir: {json.dumps(str(folder / "run"))}
              max_steps: 60
              learning_rate: 1.0e-3
              batch_size: 8
              max_length: 160
              max_prompt_length: 64
            """
        ),
        encoding="utf-8",
    )
    return recipe


def help_texts(length: int = 140) -> list[str]:
    """Pieces of Python's own help pages, about ``length`` characters each, cut at a space."""
    from pydoc_data.topics import topics

    words = (
        " ".join(" ".join(topics[name].split()) for name in sorted(topics)).encode("ascii", "ignore").decode()
    )
    pieces, start = [], 0
    while start + length < min(len(words), 400_000):
        stop = words.index(" ", start + length)
        pieces.append(words[start:stop])
        start = stop + 1
    return pieces


def byte_tokenizer() -> Any:
    """A tokenizer whose tokens are the 256 bytes, plus one end token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def train_tiny_teacher(texts: Sequence[str], folder: Path) -> None:
    """Trains a four-layer Llama over bytes on ``texts`` and saves it as an ordinary model folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    ids = [torch.tensor(tokenizer(text)["input_ids"][:140]) for text in texts]
    ids = torch.stack([row for row in ids if row.shape[0] == 140])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    pace = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=TINY_STEPS)
    for step in range(TINY_STEPS):
        batch = ids[torch.randint(len(ids), (8,), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        pace.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
