"""``selectkd estimate`` beside what a run really took (the most resident memory of its process), on seven settings.

    python benchmarks/memory.py [--json FILE]

The pair is made on the spot: a teacher of 103 and a student of 77 million parameters, two steps of 2 x 256 tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from training.tiny import WORDS, tiny_tokenizer

LENGTH = 256
SETTINGS: dict[str, dict[str, Any]] = {
    "full fp32": {},
    "full fp32, accumulation 2": {"gradient_accumulation": 2},
    "LoRA": {"lora": {"r": 16, "alpha": 32, "dropout": 0.0}},
    "activations recomputed": {"gradient_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "bf16-pure": {"precision": "bf16-pure"},
    "batch of 6": {"batch_size": 6},
}


def main() -> None:
    """Prints a row for each setting: estimated and measured MiB, and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=SETTINGS, action="append", help="one setting; may be repeated")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as made:
        root = Path(made)
        write_pair(root)
        for name in given.only or SETTINGS:
            training = SETTINGS[name]
            recipe = write_recipe(root, training)
            told = json.loads(selectkd("estimate", str(recipe), "--json", "-")[0])
            _, most = selectkd("train", str(recipe))
            rows.append({"setting": name, "estimated": told["total"], "measured": most, "parts": told})
            print(
                f"{name:<40} {told['total'] / 2**20:8.0f} {most / 2**20:8.0f} MiB  {told['total'] / most:.3f}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1), "utf-8")


def selectkd(*arguments: str) -> tuple[str, int]:
    """A command's stdout and the most memory its process held, in bytes."""
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", "selectkd", *arguments], stdout=write, stderr=subprocess.DEVNULL
    )
    os.close(write)
    with os.fdopen(read) as out:
        told = out.read()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"selectkd {' '.join(arguments)} ended with {child.returncode}")
    return told, used.ru_maxrss * 1024


def write_pair(root: Path) -> None:
    """A teacher, a student and text whose every sample fills LENGTH."""
    for name, layers in (("teacher", 12), ("student", 8)):
        config = LlamaConfig(
            vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=layers, num_attention_heads=12,
            num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        torch.manual_seed(layers)
        LlamaForCausalLM(config).save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
    with (root / "text.jsonl").open("w", encoding="utf-8") as file:
        for index in range(12):
            words = [WORDS[(index * 7 + place * 13) % len(WORDS)] for place in range(LENGTH + 8)]
            file.write(
                json.dumps({"prompt": " ".join(words[:32]), "completion": " " + " ".join(words[32:])}) + "\n"
            )


def write_recipe(root: Path, training: dict[str, Any]) -> Path:
    """A recipe for the pair; JSON is YAML."""
    content = {
        "teacher": {"model": str(root / "teacher")},
        "student": {"model": str(root / "student")},
        "data": {"sources": [{"path": str(root / "text.jsonl")}]},
        "training": {
            "output_dir": tempfile.mkdtemp(dir=root), "max_steps": 2, "batch_size": 2, "max_length": LENGTH,
            "max_prompt_length": 64, "probe_samples": 1, "save_every": None, **training,
        },
    }  # fmt: skip
    path = root / "recipe.yaml"
    path.write_text(json.dumps(content), "utf-8")
    return path


if __name__ == "__main__":
    main()
