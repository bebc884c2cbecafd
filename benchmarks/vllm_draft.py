"""The draft of `selectkd export --to vllm-draft` in vLLM: its published acceptance beside that of the models in memory.

    vllm serve TARGET --served-model-name target --dtype float32 --speculative-config "$(cat EXPORT/speculative.json)"
    python benchmarks/vllm_draft.py EXPORT --target TARGET --server http://127.0.0.1:8000 [--record]

Greedy, the same prompts and the same draft length in both. Ours computes in fp32 and has an interval, a bootstrap over
prompts; vLLM's counters are of all prompts together. With --plain URL, of vLLM without a draft, texts and pace too.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from export_text import prompts_of
from record import Row, record

from selectkd.evals.speculative.measure import Speculation, speculation, timed_alone
from selectkd.evals.speculative.served import Served, served
from selectkd.models.load import load_model
from selectkd.rollouts.completion_server import CompletionServer
from selectkd.rollouts.generate import Request, ends_of
from selectkd.teachers.remote.settings import SPECULATE


def measured(asked: argparse.Namespace, length: int) -> tuple[Speculation, list[list[int]], list[Served]]:
    """(our figures, the target's own texts, those of each server)."""
    target, draft = load_model(asked.target), load_model(asked.export)
    prompts, ends = prompts_of(target.tokenizer, asked.prompts), ends_of(target.tokenizer, target.model)
    servers = [
        CompletionServer(
            url, asked.server_model, concurrency=asked.concurrency, wait=600.0, settings=SPECULATE
        )
        for url in (asked.server, asked.plain)
        if url
    ]
    requests = [Request(tuple(one), asked.tokens) for one in prompts]
    theirs = [served(one, "vllm", requests, tokenizer=target.tokenizer, end=min(ends)) for one in servers]
    ids = [torch.tensor(one) for one in prompts]
    alone = timed_alone(target.model, ids, max_new_tokens=asked.tokens, eos=ends)
    ours = speculation(target.model, draft.model, ids, draft_length=length, alone=alone)
    return ours, [one.tokens for one in alone.texts], theirs


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("export", type=Path)
    parser.add_argument("--target", required=True)
    parser.add_argument("--server", required=True)
    parser.add_argument("--plain")
    parser.add_argument("--server-model", default="target")
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument(
        "--version", default="", help="vLLM's, for the row; the server's own where none is given"
    )
    parser.add_argument(
        "--case", help="what the draft is, for the row; the export's name where none is given"
    )
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    length = json.loads((asked.export / "speculative.json").read_bytes())["num_speculative_tokens"]
    ours, texts, theirs = measured(asked, length)
    one = theirs[0]
    if one.counts is None or one.counts.acceptance is None:
        print(f"vLLM published no acceptance: {one.not_published}")
        return 1
    low, value, high = ours.acceptance.low, ours.acceptance.value, ours.acceptance.high
    counts, acceptance = one.counts, one.counts.acceptance
    same = sum(a == b for a, b in zip(texts, one.texts, strict=True))
    case = f"{asked.case or asked.export.name}, length {length}, {len(texts)} prompts, {asked.tokens} tokens"
    print(f"{'':<10}{'acceptance':>12}{'[95%':>9}{']':>7}{'a pass':>9}  by place")
    print(
        f"{'in memory':<10}{value:>12.4f}{low:>9.4f}{high:>7.4f}{ours.mean_accepted_length:>9.3f}  {ours.by_position}"
    )
    print(f"{'vLLM':<10}{acceptance:>12.4f}{counts.mean_accepted_length:>25.3f}  {counts.by_position}")
    print(
        f"vLLM: {counts.passes} passes, {counts.drafted} drafted, {counts.accepted} accepted, {one.tokens} tokens"
    )
    print(f"the target's own text in vLLM: {same} of {len(texts)}")
    rows: list[Row] = [
        (case, "speculate", "acceptance", value, f"[{low:.3g}, {high:.3g}]", len(texts)),
        (case, "vLLM", "acceptance", acceptance, "", len(texts)),
        (case, "vLLM", "texts that are the target's own", same, "", len(texts)),
    ]
    if theirs[1:]:
        pace, equal = (
            one.pace / theirs[1].pace,
            sum(a == b for a, b in zip(one.texts, theirs[1].texts, strict=True)),
        )
        print(
            f"vLLM without a draft: the same text {equal} of {len(texts)}, speed-up by the draft {pace:.2f}"
        )
        rows += [(case, "vLLM", "texts as without a draft", equal, "", len(texts))]
    if asked.record:
        record("vllm draft", rows, beside=f"vllm {asked.version}".rstrip())
    inside = low <= acceptance <= high
    print(f"vLLM's acceptance is {'within' if inside else 'OUTSIDE'} the interval of the models in memory")
    return 0 if inside else 1


if __name__ == "__main__":
    sys.exit(main())
