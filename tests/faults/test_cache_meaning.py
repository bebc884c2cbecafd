"""Caches whose checksums are right and whose rows no teacher gives, and caches that several processes work on."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash

from faults.forked import fork_server, run_forked
from faults.tiny_cache import EXAMPLES, build
from selectkd.data.collate import collate
from selectkd.data.durable import sealed
from selectkd.data.supervised import supervised
from selectkd.errors import CacheError, NumericsError
from selectkd.loss.head import Head
from selectkd.models.load import load_model
from selectkd.teachers.cache import ModelOrigin, build_cache, open_cache, plan_of, read_index, verify
from selectkd.teachers.cache.build import SHARD_BYTES, SHARD_ROWS, CacheOptions
from selectkd.teachers.cache.codec import encode_ids, encode_log_probs
from selectkd.teachers.cache.index import fingerprint, write_index
from selectkd.teachers.cache.reader import OPEN, CachedTeacher
from selectkd.teachers.cache.shard import Shard, shard_bytes
from training.tiny import VOCABULARY, tiny_llama, tiny_tokenizer

K = 8


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    tiny_llama(1, layers=1).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def built(teacher: str, tmp_path_factory: Any) -> Callable[[CacheOptions], Path]:
    """A cache of the tiny teacher that holds the rows of these options, built once."""
    made: dict[CacheOptions, Path] = {}

    def of(options: CacheOptions) -> Path:
        if options not in made:
            made[options] = tmp_path_factory.mktemp("cache") / "whole"
            built_by(teacher, made[options], options)
        return made[options]

    return of


def built_by(
    teacher: str, folder: Path, options: CacheOptions, change: Callable[[Any], None] | None = None
) -> None:
    loaded = load_model(teacher)
    if change is not None:
        with torch.no_grad():
            change(loaded.model)
    origin = ModelOrigin(loaded, model=teacher, dtype="float32")
    plan, records = plan_of(origin, tokenizer=loaded.tokenizer, examples=EXAMPLES, options=options)
    build_cache(folder, plan, records, origin, say=lambda _: None)


def use(folder: Path) -> None:
    """Reads every row as a run does."""
    read = CachedTeacher(open_cache(folder))
    for start in range(0, len(EXAMPLES), 8):
        batch = collate(EXAMPLES[start : start + 8], pad_id=0)
        read(batch, supervised(batch).position)


def rewritten(folder: Path, change: Callable[[np.ndarray[Any, Any]], Any], number: int = 1) -> None:
    """Changes the rows of a shard, and makes every checksum right again, that of the index too."""
    index = read_index(folder / "index.json")
    path = folder / "shards" / f"{number:06d}.shard"
    shard = Shard(path, number, fingerprint(index))
    rows = shard.rows(np.arange(shard.count)).copy()
    change(rows)
    places = [shard.places[a:b] for a, b in zip(shard.first[:-1], shard.first[1:], strict=True)]
    content = shard_bytes(number, shard.keys, places, rows, fingerprint(index))
    path.write_bytes(content)
    index["shards"][number]["checksum"] = bytes(content[-16:]).hex()
    write_index(folder / "index.json", {key: value for key, value in index.items() if key != "checksum"})


def best(ids: list[int], logp: list[float]) -> tuple[Any, Any]:
    """One row of ids and log-probabilities, for both precisions."""
    return np.array([ids]), np.array([logp], np.float32)


FLAT = [-3.0 - 0.01 * i for i in range(K)]
SOUND = np.log([0.5, 0.2, 0.1, 0.05, 0.04, 0.03, 0.02, 0.01]).tolist()
ROWS = {
    "a mass above 1": (list(range(K)), [-0.5] * K),
    "a log-probability above 0": (list(range(K)), [0.7, *SOUND[1:]]),
    "an id twice": ([0, 1, 2, 3, 4, 5, 6, 6], SOUND),
    "an id beyond the vocabulary": ([*range(K - 1), VOCABULARY], SOUND),
    "nothing but -50": (list(range(K)), [-50.0] * K),
    "nothing but -1e30": (list(range(K)), [-1e30] * K),
    "a constant taken off": (list(range(K)), [value - 2.0 for value in SOUND]),
    "less mass than the others can fill": (list(range(K)), [-1.0, *[-30.0] * (K - 1)]),
}


@pytest.mark.parametrize("precision", ["float32", "packed"])
@pytest.mark.parametrize("what", sorted(ROWS))
def test_best_tokens_that_no_teacher_gives_are_found_by_verify_and_at_first_touch(
    what: str, precision: str, built: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(built(CacheOptions("top_k", K, precision, 30)), tmp_path / "cache")
    ids, logp = best(*ROWS[what])
    width = VOCABULARY + 1 if ids.max() >= VOCABULARY else VOCABULARY

    def change(rows: Any) -> None:
        coded = encode_log_probs(logp) if precision == "packed" else logp.view(np.uint8)
        rows[2] = np.concatenate([encode_ids(ids, width)[:, : rows.shape[1] - coded.shape[1]], coded], 1)

    use(folder)
    assert not verify(folder)
    rewritten(folder, change)
    assert verify(folder).shards == [1], what
    with pytest.raises(CacheError, match=r"shard 1, record \d+ row 2 has .*: no teacher gives that"):
        use(folder)


@pytest.mark.parametrize("payload", ["top_k", "sampled"])
@pytest.mark.parametrize("fill", [0, 255])
def test_ids_that_cannot_be_decoded_are_found_by_verify_and_at_first_touch(
    payload: str, fill: int, built: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(built(CacheOptions(payload, K, None, 30)), tmp_path / "cache")
    rewritten(folder, lambda rows: rows[3].fill(fill))
    assert verify(folder).shards == [1]
    with pytest.raises(CacheError, match="ids, and 8 belong there"):
        use(folder)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("value", "told"), [(0.0, "all zeros"), (1e30, "beyond any norm")])
def test_hidden_states_that_no_norm_gives_are_found_by_verify_and_at_first_touch(
    precision: str, value: float, told: str, built: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(built(CacheOptions("hidden", None, precision, 30)), tmp_path / "cache")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[precision]

    def change(rows: Any) -> None:
        width = rows.shape[1] // dtype.itemsize
        rows[4] = torch.full((width,), value, dtype=dtype).view(torch.uint8).numpy()

    rewritten(folder, change)
    assert verify(folder).shards == [1]
    with pytest.raises(CacheError, match=told):
        use(folder)


def nan_rows(rows: Any) -> None:
    rows[1] = torch.full((rows.shape[1] // 4,), float("nan")).view(torch.uint8).numpy()


def test_one_row_that_was_not_finite_is_kept_and_a_shard_of_them_is_a_broken_teachers(
    built: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(built(CacheOptions("hidden", None, "float32", 30)), tmp_path / "cache")
    rewritten(folder, nan_rows)
    assert not verify(folder)
    use(folder)  # the run gives it weight 0, and counts it

    def all_of_them(rows: Any) -> None:
        rows[:] = torch.full(rows.shape, float("nan")).numpy().view(np.uint8)[:, : rows.shape[1]]

    rewritten(folder, all_of_them)
    [told] = verify(folder).problems
    assert "rows are not finite" in told


def nan_everywhere(model: Any) -> None:
    for weight in model.parameters():
        weight.fill_(float("nan"))


def nan_in_the_last_norm(model: Any) -> None:
    model.model.norm.weight.fill_(float("nan"))


@pytest.mark.parametrize("change", [nan_everywhere, nan_in_the_last_norm])
@pytest.mark.parametrize(
    "options",
    [
        CacheOptions(),
        CacheOptions("top_k", K),
        CacheOptions("top_k", K, "float32"),
        CacheOptions("sampled", K),
    ],
    ids=str,
)
def test_a_teacher_without_finite_numbers_fills_no_cache(
    options: CacheOptions, change: Any, teacher: str, tmp_path: Path
) -> None:
    with pytest.raises(NumericsError, match="not finite"):
        built_by(teacher, tmp_path / "cache", options, change)
    assert not (tmp_path / "cache" / "index.json").exists()
    assert not list(tmp_path.rglob("*.shard")) and not list(tmp_path.rglob("*.partial-*"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("k", -1), ("k", "8"), ("k", 10**6), ("payload", "all"), ("precision", None), ("head", None),
     ("head", {"vocabulary": "64"}), ("shards", {}), ("shards", [{}]), ("rows", 7), ("records", None),
     ("shard_rows", 0), ("text", []), ("engine", None), ("teacher", "x")],
)  # fmt: skip
def test_an_index_that_no_build_writes_is_refused_by_name(
    key: str, value: Any, built: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(built(CacheOptions("top_k", K, None, 30)), tmp_path / "cache")
    index = read_index(folder / "index.json")
    (folder / "index.json").write_bytes(sealed({**index, key: value}))
    with pytest.raises(CacheError, match=r"index\.json"):
        use(folder)
    assert verify(folder)


def test_a_head_that_is_none_is_refused(built: Any, tmp_path: Path) -> None:
    from selectkd.teachers.cache.origin import head_bytes

    folder = shutil.copytree(built(CacheOptions("hidden", None, "float32", 30)), tmp_path / "cache")
    index, head = read_index(folder / "index.json"), open_cache(folder).head()
    for weight in (head.weight * float("nan"), head.weight[:, :-1]):
        content = head_bytes(Head(weight))
        (folder / "head.safetensors").write_bytes(content)
        said = {**index["head"], "checksum": xxhash.xxh3_128(content).hexdigest()}
        plain = {key: one for key, one in index.items() if key != "checksum"}
        write_index(folder / "index.json", {**plain, "head": said})
        with pytest.raises(CacheError, match=r"head\.safetensors|shard 0"):
            use(folder)


def test_a_shard_cut_short_under_a_reader_is_an_error_and_not_the_end_of_the_process(
    built: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(built(CacheOptions("hidden", None, "float32", 10_000)), tmp_path / "cache")
    program = (
        "import os, sys\n"
        "from faults.test_cache_meaning import *\n"
        "from pathlib import Path\n"
        "folder = Path(sys.argv[1])\n"
        "read = CachedTeacher(open_cache(folder))\n"
        "os.truncate(folder / 'shards' / '000000.shard', 4096)\n"
        "batch = collate(EXAMPLES[:8], pad_id=0)\n"
        "try:\n"
        "    read(batch, supervised(batch).position)\n"
        "except CacheError as error:\n"
        "    print(error)\n"
        "    sys.exit(5)\n"
    )
    done = run_forked("-c", program, str(folder))
    assert done.returncode == 5, done.stderr[-2000:]
    assert "shard 0" in done.stdout and "while it is read" in done.stdout


def test_a_cache_of_more_shards_than_files_may_be_open_is_built_verified_and_read(
    teacher: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("selectkd.teachers.cache.reader.OPEN", 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 64
    shards = 40
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (there + 30, hard))
        build(teacher, tmp_path / "cache", shard_rows=1)
        reader = open_cache(tmp_path / "cache")
        assert len(reader.entries) >= shards and not verify(tmp_path / "cache")
    except CacheError as error:
        raise AssertionError(str(error)) from error
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_shards_have_their_size_by_their_bytes(teacher: str) -> None:
    loaded = load_model(teacher)
    origin = ModelOrigin(loaded, model=teacher, dtype="float32")
    plan, _ = plan_of(origin, tokenizer=loaded.tokenizer, examples=EXAMPLES, options=CacheOptions())
    assert plan["shard_rows"] == SHARD_ROWS  # narrow rows: what a killed build loses is bounded too
    loaded.model.config.hidden_size = width = 8192
    origin.head = Head(torch.zeros(VOCABULARY, width))
    plan, _ = plan_of(
        origin, tokenizer=loaded.tokenizer, examples=EXAMPLES, options=CacheOptions(precision="float32")
    )
    assert plan["shard_rows"] * plan["row_bytes"] == SHARD_BYTES


def test_builders_at_once_share_the_shards_and_all_end_with_a_whole_cache(
    teacher: str, built: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    both = [fork_server().Process(target=build, args=(teacher, folder, 0.02)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(240)
    assert [one.exitcode for one in both] == [0, 0]
    assert not verify(folder) and not list(folder.rglob("*.partial-*"))
    use(folder)
    entries = read_index(folder / "index.json")["shards"]
    assert len(list((folder / "shards").iterdir())) == len(entries) > 30


def test_a_reader_keeps_no_more_shards_open_than_it_says(
    teacher: str, tmp_path: Path, monkeypatch: Any
) -> None:
    assert OPEN <= 256
    monkeypatch.setattr("selectkd.teachers.cache.reader.OPEN", 3)
    build(teacher, tmp_path / "cache")
    reader = open_cache(tmp_path / "cache")
    assert len(reader.open) == 3 and len(reader.entries) > 30
    use(tmp_path / "cache")
