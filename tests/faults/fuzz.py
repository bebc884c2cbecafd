"""Recipes, overrides, caches and servers' answers at random: ``make fuzz``.

    python tests/faults/fuzz.py --recipes 10000 --bytes 100000

A recipe, as text, as values or changed by an override, must be valid or end with a ConfigError (exit code 2). The
bytes of an answer must become rows of known tokens with a mass of 1 at the most, or a WrongAnswer; those of a cache
must become the rows that were stored, or an IntegrityError (exit code 5). Anything else that is raised would be a
traceback; what takes more than a second of the process's time counts as a hang. One in five of the bytes is a cache's.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import string
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch

from faults.tiny_cache import EXAMPLES, build
from selectkd.config import Recipe, load_recipe
from selectkd.config.load import recipe_from
from selectkd.data.collate import collate
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, IntegrityError
from selectkd.rollouts.completion_server import completion_of
from selectkd.rollouts.generate import Request
from selectkd.teachers.cache import open_cache
from selectkd.teachers.cache.reader import CachedTeacher
from selectkd.teachers.remote.answers import TopKRequest, WrongAnswer
from selectkd.teachers.remote.dialects import DIALECTS
from teachers.served import openai, sglang, vllm
from training.tiny import VOCABULARY, tiny_llama, tiny_tokenizer

HANG = 1.0
ALPHABET = "{}[]:,-&*!|>'\"%@`#?\t\n \\0aé\x00"
WHOLE: dict[str, Any] = {
    "teacher": {"model": "teacher"},
    "student": {"from_teacher": {"layers": 2, "choose": "even"}},
    "data": {"sources": [{"path": "data.jsonl", "name": "a", "limit": 5}], "evaluation": 0.1},
    "objective": {
        "divergence": {"name": "skew_kl", "alpha": 0.1}, "verifier": {"name": "spec_k", "k": 3},
        "beta": {"start": 1.0, "end": 0.01, "until_tar": 0.5}, "reduction": "sequence_mean",
    },
    "training": {
        "output_dir": "runs/x", "max_steps": 10, "batch_size": 4, "learning_rate": 1e-4, "lora": {"r": 4},
        "early_stopping": {"patience": 2}, "save_every": 5, "evaluate_every": 5,
    },
}  # fmt: skip
IDS, PLACES, K = [5, 9, 33, 2, 17, 60, 8, 41], [1, 2, 4, 6], 4


class Tally:
    """What the cases came to. ``told``: the first traceback of each kind."""

    def __init__(self) -> None:
        self.cases = self.hangs = self.slowest = 0.0
        self.ends: Counter[str] = Counter()
        self.told: dict[str, str] = {}

    def case(self, run: Callable[[], str]) -> None:
        started = time.process_time()
        try:
            end = run()
        except Exception as error:
            end = "traceback"
            self.told.setdefault(type(error).__name__, traceback.format_exc(limit=-4))
        seconds = time.process_time() - started
        self.cases += 1
        self.ends[end] += 1
        self.slowest = max(self.slowest, seconds)
        self.hangs += seconds > HANG

    @property
    def tracebacks(self) -> int:
        return self.ends["traceback"]


def paths_of(value: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of a nest."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [
        *([here] if here else []),
        *(path for key, each in inner for path in paths_of(each, (*here, key))),
    ]


def junk(draw: random.Random, depth: int = 2) -> Any:
    """A value of any kind."""
    word = "".join(draw.choice(string.printable + "é\u2028\ud800") for _ in range(draw.randrange(9)))
    plain = [
        None, True, False, 0, -1, 1, 3, 10**400, draw.randint(-9, 99), draw.uniform(-2, 2), math.nan, math.inf, 1e-4,
        "1e-4", word, "../x", "module:name", "spec_k", "forward_kl", "auto", "",
    ]  # fmt: skip
    if depth == 0 or draw.random() < 0.7:
        return draw.choice(plain)
    if draw.random() < 0.5:
        return [junk(draw, depth - 1) for _ in range(draw.randrange(4))]
    keys = ["name", "k", "alpha", "model", "path", "start", "layers", word]
    return {draw.choice(keys): junk(draw, depth - 1) for _ in range(draw.randrange(4))}


def changed(draw: random.Random) -> dict[str, Any]:
    """The whole recipe with one to three values replaced, dropped or added."""
    values = json.loads(json.dumps(WHOLE))
    for _ in range(draw.randint(1, 3)):
        *above, last = draw.choice(paths_of(values))
        here = values
        for key in above:
            here = here[key]
        if isinstance(here, dict) and draw.random() < 0.2:
            del here[last]
        elif isinstance(here, dict) and draw.random() < 0.2:
            here[str(last) + draw.choice("s_x")] = junk(draw)
        else:
            here[last] = junk(draw)
    return values


def override(draw: random.Random) -> str:
    """A --set of any key and any value."""
    known = draw.choice([path for path in paths_of(WHOLE) if all(isinstance(key, str) for key in path)])
    key = (
        ".".join(known) if draw.random() < 0.8 else "".join(draw.choice(ALPHABET + "abc.") for _ in range(9))
    )
    value = junk(draw)
    text = json.dumps(value) if draw.random() < 0.5 else str(value)
    return key + draw.choice(["=", "=", "=", ":", ""]) + text


def recipes(count: int, seed: int, folder: Path) -> Tally:
    """Texts, values and overrides in turn."""
    draw, tally, file = random.Random(seed), Tally(), folder / "recipe.yaml"
    plain = json.dumps(WHOLE, indent=1)

    def valid(make: Callable[[], Any]) -> str:
        try:
            made = make()
        except ConfigError as error:
            assert error.exit_code == 2 and 0 < len(str(error).splitlines()) <= 6, str(error)
            return "refused"
        assert isinstance(made, Recipe)
        return "valid"

    for index in range(count):
        if index % 3 == 0:
            file.write_bytes(mutated(draw, plain.encode(), ALPHABET.encode()))
            tally.case(lambda: valid(lambda: load_recipe(file)))
        elif index % 3 == 1:
            values = changed(draw)
            tally.case(lambda values=values: valid(lambda: recipe_from(values)))
        else:
            said = [override(draw) for _ in range(draw.randint(1, 2))]
            tally.case(lambda said=said: valid(lambda: recipe_from(json.loads(plain), said)))
    return tally


def mutated(draw: random.Random, content: bytes, alphabet: bytes = bytes(range(256))) -> bytes:
    """Bytes with one to four edits: changed, lost, put in, said twice, cut off, filled with zeros."""
    text = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(text) + 1)
        length = min(len(text) - at, draw.choice([1, 1, 2, 8, 64]))
        new = bytes(draw.choice(alphabet) for _ in range(max(length, 1)))
        kind = draw.randrange(7)
        text[at : at + length] = (
            new, b"", new + text[at : at + length], text[at : at + length] * 2, bytes(length),
            draw.choice([b"NaN", b"1e999", b"null", b"-1", b"[" * 3000, b'"x"', b"\xff", b"{}"]), new,
        )[kind]  # fmt: skip
        if draw.random() < 0.05:
            del text[draw.randrange(len(text) + 1) :]
    return bytes(text)


def answers(count: int, seed: int) -> Tally:
    """Servers' answers, each kind in turn."""
    draw, tally = random.Random(seed), Tally()
    logp = torch.log_softmax(
        3 * torch.randn(len(IDS), VOCABULARY, generator=torch.Generator().manual_seed(3)), -1
    )
    request, tokenizer = TopKRequest(IDS, PLACES, K, VOCABULARY), tiny_tokenizer()
    written = json.dumps({"choices": [{"text": "w1", "token_ids": [4, 5], "finish_reason": "stop"}]}).encode()
    kinds = {
        name: json.dumps(make(IDS, logp, K)).encode()
        for name, make in (("vllm", vllm), ("sglang", sglang), ("openai", openai))
    }

    def read(name: str, body: bytes) -> str:
        try:
            if name == "text":
                text = completion_of(body, Request(IDS, 5), tokenizer, 1)
                assert all(0 <= token < len(tokenizer) for token in text.ids)
                return "text"
            rows = DIALECTS[name].read(body, request)
        except WrongAnswer:
            return "refused"
        assert (rows.logp <= 0).all() and (
            np.exp(rows.logp).sum(1) < 1.01
        ).all()  # -inf is an impossible token
        assert ((rows.ids >= 0) & (rows.ids < VOCABULARY)).all() and rows.ids.shape == (len(PLACES), K)
        return "rows"

    names = [*kinds, "text"]
    for index in range(count):
        name = names[index % len(names)]
        body = mutated(draw, kinds.get(name, written))
        tally.case(lambda name=name, body=body: read(name, body))
    return tally


def rows_of(folder: Path) -> list[torch.Tensor]:
    """Every row of a cache, as a run reads them."""
    teacher, found = CachedTeacher(open_cache(folder)), []
    for start in range(0, len(EXAMPLES), 20):
        batch = collate(EXAMPLES[start : start + 20], pad_id=0)
        rows: Any = teacher(batch, supervised(batch).position)
        found.append(rows.hidden)
    return found


def caches(count: int, seed: int, folder: Path) -> Tally:
    """A cache with one file changed."""
    draw, tally = random.Random(seed), Tally()
    (folder / "teacher").mkdir()
    tiny_llama(1, layers=1).save_pretrained(folder / "teacher")
    tiny_tokenizer().save_pretrained(folder / "teacher")
    build(str(folder / "teacher"), folder / "cache", shard_rows=10_000)
    whole = rows_of(folder / "cache")
    files = sorted(path for path in (folder / "cache").iterdir() if path.is_file())

    def read() -> str:
        try:
            found = rows_of(folder / "cache")
        except IntegrityError as error:
            assert error.exit_code == 5 and len(str(error).splitlines()) <= 6
            return "refused"
        assert all(map(torch.equal, found, whole)), "other rows than were stored"
        return "rows"

    for _ in range(count):
        file = draw.choice(files)
        content = file.read_bytes()
        file.write_bytes(mutated(draw, content))
        tally.case(read)
        file.write_bytes(content)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipes", type=int, default=10_000)
    parser.add_argument("--bytes", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        every = {
            "recipes": recipes(given.recipes, given.seed, Path(folder)),
            "answers": answers(given.bytes - given.bytes // 5, given.seed),
            "caches": caches(given.bytes // 5, given.seed, Path(folder)),
        }
    for name, tally in every.items():
        print(f"{name}: {dict(tally.ends)}, slowest {tally.slowest:.3f} s")
        for text in tally.told.values():
            print(text)
    of_bytes = (every["answers"], every["caches"])
    print(
        f"recipes {every['recipes'].cases:.0f}, tracebacks {every['recipes'].tracebacks}; "
        f"bytes {sum(one.cases for one in of_bytes):.0f}, tracebacks {sum(one.tracebacks for one in of_bytes)}, "
        f"hangs {sum(one.hangs for one in every.values()):.0f}"
    )
    return 1 if any(one.tracebacks or one.hangs for one in every.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
