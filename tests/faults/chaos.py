"""Runs killed at random, and what they left compared with runs that were not: ``make chaos KILLS=N``.

A fork server: torch and transformers are imported once, each run is a fork of that. Every setting (verifier, full or
LoRA, live or cached teacher, accumulation 1 or 3, steps between checkpoints) has one whole run as a reference;
then runs of it are killed with SIGKILL at a uniformly random moment of a run's length, again and again, each time
started by the same command, until one comes to its end, or is let alone after eight kills. stuck: a start that ended
with an error, or did not end. different: an end whose metrics, student, weights or optimizer are not the reference's,
to the byte.

    python tests/faults/chaos.py --kills 200
    python tests/faults/chaos.py --kills 40 --plain     # transformers.Trainer with its own checkpoints, beside it
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from tqdm.std import TqdmDefaultWriteLock

from faults.tiny_run import left, recipe_for, write_dropping_pair
from selectkd.training.run import train

SETTINGS: list[dict[str, Any]] = [
    {"verifier": verifier, "lora": lora, "cached": cached, "accumulation": accumulation}
    for verifier, lora, cached, accumulation in itertools.product(
        ("greedy", "spec_k"), (False, True), (False, True), (1, 3)
    )
]
EVERY = (1, 2, 3)
KILLS_OF_A_RUN = 8
"""A busy machine is slower than it was for the reference; then kills alone would never let a run end."""


def main() -> int:
    """Prints what every setting came to, and the line ``kills N, stuck N, different N`` last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="the plain transformers.Trainer instead")
    parser.add_argument("--quiet", action="store_true", help="the last line alone")
    parser.add_argument("--keep", type=Path, help="a folder for copies of runs that came out different")
    given = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="chaos-"))
    try:
        tally = chaos(root, given.kills, given.seed, plain=given.plain, quiet=given.quiet, keep=given.keep)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print("kills {kills}, stuck {stuck}, different {different}".format(**tally))
    return int(bool(tally["stuck"] or tally["different"]))


def chaos(
    root: Path, kills: int, seed: int, *, plain: bool = False, quiet: bool = False, keep: Path | None = None
) -> dict[str, int]:
    """Kills runs until ``kills`` of them were hit at work; {"kills", "stuck", "different"}."""
    pair = write_dropping_pair(root / "pair") if (root / "pair").mkdir() is None else root
    dice = random.Random(seed)
    tally = {"kills": 0, "stuck": 0, "different": 0}
    references: dict[str, tuple[dict[str, bytes], float]] = {}
    for turn, setting in enumerate(settings(dice)):
        if tally["kills"] >= kills:
            break
        name = "-".join(f"{key}={value}" for key, value in setting.items())
        job = plain_job(pair, setting) if plain else our_job(pair, root / "cache", setting)
        if name not in references:
            folder = root / f"whole-{len(references)}"
            started = time.monotonic()
            if in_fork(lambda run=folder, job=job: job(run)) != 0:
                raise SystemExit(f"the run that nothing happens to fails: {name}")
            references[name] = (remains(folder, plain), time.monotonic() - started)
        expected, length = references[name]
        run, other = root / f"killed-{turn}", []
        mine = {"kills": 0, "stuck": 0, "different": 0}
        for start in range(KILLS_OF_A_RUN + 1):
            last = start == KILLS_OF_A_RUN or tally["kills"] + mine["kills"] >= kills
            wait = None if last else dice.uniform(0, length)
            code = in_fork(lambda run=run, job=job: job(run), kill_after=wait)
            if code == 0:
                found = remains(run, plain)
                other = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
                mine["different"] = int(bool(other))
                break
            if code == -signal.SIGKILL and wait is not None:
                mine["kills"] += 1
            else:
                mine["stuck"] = 1
                break
        for key in tally:
            tally[key] += mine[key]
        if mine["different"]:
            print(f"different: {', '.join(other[:8])}")
            if keep is not None:
                shutil.copytree(run, keep / f"{turn}")
        if not quiet:
            print(
                f"{mine['kills']:3d} kills{', STUCK' * mine['stuck']}{', DIFFERENT' * mine['different']}  {name}"
            )
        shutil.rmtree(run, ignore_errors=True)
    return tally


def settings(dice: random.Random) -> Iterator[dict[str, Any]]:
    """All settings in a random order, over and over, each time with another distance of checkpoints."""
    while True:
        order = list(SETTINGS)
        dice.shuffle(order)
        for setting in order:
            yield {**setting, "every": dice.choice(EVERY)}


def our_job(pair: Path, caches: Path, setting: dict[str, Any]) -> Callable[[Path], None]:
    """``selectkd train`` of a setting in a folder, always the same command."""
    rest = dict(setting)
    cached, every = rest.pop("cached"), rest.pop("every")

    def job(run: Path) -> None:
        cache = cache_of(pair, caches) if cached else None
        train(recipe_for(pair, run, cache=cache, save_every=every, **rest))

    if cached and not caches.exists():
        in_fork(lambda: build_cache_of(pair, caches))
    return job


def build_cache_of(pair: Path, folder: Path) -> None:
    """The teacher's rows of the pair's text, by the command a user has."""
    from selectkd.cli import main as selectkd

    recipe = folder.parent / "cache.json"  # JSON is YAML
    content = recipe_for(pair, folder.parent / "unused", cache=folder).model_dump(
        mode="json", exclude_none=True
    )
    content["training"]["max_steps"] = 6
    recipe.write_text(json.dumps(content), "utf-8")
    if selectkd(["cache", "build", str(recipe)]) != 0:
        raise SystemExit("the cache could not be built")


def cache_of(pair: Path, folder: Path) -> Path:
    """The cache that ``our_job`` built."""
    return folder


def plain_job(pair: Path, setting: dict[str, Any]) -> Callable[[Path], None]:
    """The same student and text on the plain Trainer, ``resume_from_checkpoint`` given where it finds a checkpoint."""

    def job(run: Path) -> None:
        from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
        from transformers.trainer_utils import get_last_checkpoint

        from training.tiny import texts

        set_seed(42)
        rows: Any = [
            {
                "input_ids": torch.tensor((example.input_ids * 4)[:24]),
                "labels": torch.tensor((example.input_ids * 4)[:24]),
            }
            for example in texts(18)
        ]
        args = TrainingArguments(
            output_dir=str(run), max_steps=6, per_device_train_batch_size=3, learning_rate=1e-2, save_strategy="steps",
            save_steps=setting["every"], save_total_limit=2, report_to="none", use_cpu=True, disable_tqdm=True,
            gradient_accumulation_steps=setting["accumulation"], logging_steps=1,
        )  # fmt: skip
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(pair / "student"), args, train_dataset=rows)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.is_dir() else None)
        trainer.save_model(str(run / "final"))

    return job


def remains(run: Path, plain: bool) -> dict[str, bytes]:
    """What must be the same to the byte."""
    return {"model": (run / "final" / "model.safetensors").read_bytes()} if plain else left(run)


def own_progress_bars() -> None:
    """Gives this process's progress bars a lock of its own: tqdm's is a semaphore that all forks share, and a run that
    is killed while it holds it would hang every later one."""
    lock = threading.RLock()
    TqdmDefaultWriteLock.acquire = lambda _, *args, **keys: lock.acquire(*args, **keys)
    TqdmDefaultWriteLock.release = lambda _: lock.release()


def in_fork(work: Callable[[], None], *, kill_after: float | None = None) -> int:
    """Runs ``work`` in a fork of this process; its exit code, or minus the signal that ended it.

    kill_after: seconds after which it gets SIGKILL; 127 for a fork that does not end within a minute.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own_progress_bars()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if not os.environ.get("CHAOS_ERRORS"):
                os.dup2(null, 2)
            work()
            code = 0
        except BaseException as error:
            if os.environ.get("CHAOS_ERRORS"):
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    deadline = time.monotonic() + (60.0 if kill_after is None else kill_after)
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 127 if kill_after is None else code


if __name__ == "__main__":
    sys.exit(main())
