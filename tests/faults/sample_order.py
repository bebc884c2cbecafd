"""Which samples a run that is killed again and again has trained on, beside those of a run that nothing happened to.

A small `train` run notes each micro-batch that it takes, with its place in the stream. It is killed with SIGKILL at a
random moment, started again by the same command, killed again, and at last let alone. repeated: places whose samples
another start saw otherwise, or samples that an epoch has twice. lost: places or samples that are missing.

    python tests/faults/sample_order.py --kills 10
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from faults.chaos import in_fork
from faults.tiny_run import recipe_for, write_dropping_pair
from selectkd.training.feed import BatchFeed
from selectkd.training.run import train

WAYS: dict[str, dict[str, Any]] = {
    "map-style": {},
    "map-style, packed": {"packing": True},
    "streaming": {"streaming": True},
    "streaming, packed": {"streaming": True, "packing": True},
}
STEPS = 60
Places = dict[tuple[int, int], list[list[int]]]


def run_of(pair: Path, run: Path, way: str, kill: tuple[int, float] | None = None) -> None:
    """One start of the run of a way; what it takes goes into the file ``samples`` beside it.

    kill: (micro-batches, seconds) after which it gets SIGKILL, None for never.
    """
    recipe = recipe_for(pair, run, save_every=3, max_steps=STEPS, evaluate_every=None)
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=WAYS[way])})
    plain = BatchFeed.__iter__

    def noted(feed: BatchFeed) -> Iterator[Any]:
        for number, batch in enumerate(plain(feed), start=1):
            if kill is not None and number == kill[0]:
                threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            samples = [ids.tolist() for ids in batch.samples()]
            with run.with_suffix(".samples").open("a") as file:
                file.write("\n" + json.dumps([feed.epoch, feed.taken, samples]))
            yield batch

    BatchFeed.__iter__ = noted  # type: ignore[method-assign]
    train(recipe)


def taken(run: Path) -> tuple[Places, int]:
    """The samples at each place of the stream, and the places that two starts saw otherwise."""
    places: Places = {}
    otherwise = 0
    for line in run.with_suffix(".samples").read_text().splitlines():
        try:
            epoch, number, samples = json.loads(line)
        except ValueError:  # a line that a kill cut short
            continue
        before = places.setdefault((epoch, number), samples)
        if before != samples:
            otherwise += 1
            print(f"epoch {epoch}, micro-batch {number}: {before} and {samples}", file=sys.stderr)
    return places, otherwise


def samples_of(places: Places, epoch: int) -> Counter[str]:
    """The samples of an epoch; a micro-batch whose records are all held out has a token of padding."""
    return Counter(
        str(one) for place, some in places.items() if place[0] == epoch for one in some if one != [0]
    )


def killed(root: Path, way: str, kills: int, seed: int) -> dict[str, int]:
    """{"kills", "repeated", "lost"} of a way; SystemExit where a start fails."""
    dice = random.Random(f"{way}/{seed}")
    pair = root / "pair"
    if not pair.exists():
        pair.mkdir()
        write_dropping_pair(pair)
    name = way.replace(", ", "-")
    whole, run = root / f"{name}-whole", root / f"{name}-killed"
    if in_fork(lambda: run_of(pair, whole, way)):
        raise SystemExit(f"{way}: the run that nothing happens to fails")
    done = 0
    while done < kills:
        kill = dice.randint(1, 6), dice.uniform(0, 0.1)
        code = in_fork(lambda kill=kill: run_of(pair, run, way, kill))
        if code != -signal.SIGKILL:
            raise SystemExit(f"{way}: a start after {done} kills ends with {code}")
        done += 1
    if code := in_fork(lambda: run_of(pair, run, way)):
        raise SystemExit(f"{way}: the last start ends with {code}")
    expected, _ = taken(whole)
    found, otherwise = taken(run)
    lost = sum(found.get(place) != samples for place, samples in expected.items())
    repeated = otherwise + len(found.keys() - expected.keys())
    last = max(epoch for epoch, _ in found)
    for epoch in range(last):  # the whole ones
        counts, first = (samples_of(found, one) for one in (epoch, 0))
        repeated, lost = repeated + (counts - first).total(), lost + (first - counts).total()
    return {"kills": done, "micro-batches": len(found), "repeated": repeated, "lost": lost}


def main() -> int:
    """Prints a line for each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="order-", ignore_cleanup_errors=True) as root:
        for way in given.ways:
            found = killed(Path(root), way, given.kills, given.seed)
            print(f"{way}: " + ", ".join(f"{name} {value}" for name, value in found.items()), flush=True)
            bad += found["repeated"] + found["lost"] + (found["kills"] < given.kills)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
