"""Text on an object store and behind a web server: trained on, cached, gone on with; changed files; credentials."""

from __future__ import annotations

import functools
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selectkd.config.load import recipe_from
from selectkd.data.places import Place
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source, streamed_source
from selectkd.data.text_cache import TextCache
from selectkd.errors import ConfigError, DataError, Preempted
from selectkd.training.run import train
from training.tiny import recipe_of, tiny_llama, tiny_tokenizer, write_pair

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def store() -> Iterator[dict[str, Any]]:
    """The options of an S3 store on this machine; its credentials are in the environment."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.delenv("AWS_SESSION_TOKEN", raising=False)
        yield {"client_kwargs": {"endpoint_url": f"http://{host}:{port}", "region_name": "us-east-1"}}
    server.stop()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, store: dict[str, Any]) -> Path:
    """The tiny pair; its text is in two files on the store, and in memory."""
    import fsspec
    import s3fs

    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=1))
    system = s3fs.S3FileSystem(**store)
    system.call_s3("create_bucket", Bucket="bucket")
    rows = (root / "text.jsonl").read_bytes().splitlines(keepends=True)
    files = {
        "bucket/train/part-0.jsonl": b"".join(rows[:10]),
        "bucket/train/part-1.jsonl": b"".join(rows[10:]),
    }
    system.pipe(files)
    fsspec.filesystem("memory").pipe({f"/{name}": content for name, content in files.items()})
    return root


class Stops:
    """A listener that asks the run to stop behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

    def line(self, line: dict[str, Any]) -> None:
        if line["step"] == self.step:
            self.step = -1
            os.kill(os.getpid(), 15)


S3, MEMORY = "s3://bucket/train/*.jsonl", "memory://bucket/train/*.jsonl"


def recipe(pair: Path, run: Path, store: dict[str, Any], path: str = S3, **data: Any) -> Any:
    source = {"path": path, "name": "made", "storage_options": store}
    training = {"output_dir": str(run), "max_steps": 4, "batch_size": 3, "max_length": 32, "save_every": 1}
    data = {"sources": [source], "evaluation": 0.25, "cache": str(run.parent / "cache"), **data}
    return recipe_from(recipe_of(pair, data=data, training=training))


@pytest.mark.parametrize("streaming", [False, True], ids=["map-style", "streaming"])
@pytest.mark.parametrize("path", [S3, MEMORY], ids=["s3", "memory"])
def test_text_elsewhere_is_trained_on_cached_and_gone_on_with(tmp_path, pair, store, path, streaming, capfd):
    options = store if path == S3 else {}
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = recipe(pair, tmp_path / "whole" / "run", options, path, streaming=streaming)
    train(whole)
    stopped = recipe(pair, tmp_path / "stopped" / "run", options, path, streaming=streaming)
    with pytest.raises(Preempted):
        train(stopped, progress=Stops(2))
    with pytest.MonkeyPatch.context() as patch:
        if not streaming:  # the text is in the cache: nothing is rendered any more
            patch.setattr("selectkd.data.text_cache.part_of", None)
        assert train(stopped).resumed_from == 2
    one, other = (tmp_path / name / "run" / "metrics.jsonl" for name in ("whole", "stopped"))
    assert one.read_bytes() == other.read_bytes()
    if path == S3 and not streaming:  # which is in chunks of other files
        local = recipe_of(pair, data={"evaluation": 0.25, "cache": str(tmp_path / "cache")})
        training = whole.training.model_dump() | {"output_dir": str(tmp_path / "local")}
        train(recipe_from({**local, "training": training}))
        assert (tmp_path / "local" / "metrics.jsonl").read_bytes() == one.read_bytes()
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 20
    assert not any(SECRET.encode() in file.read_bytes() for file in written)
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize("read", [dataset_source, streamed_source])
def test_a_file_that_changes_on_the_store_between_two_starts_is_read_again(tmp_path, pair, store, read):
    import s3fs

    system = s3fs.S3FileSystem(**store)
    spec = {"path": "s3://bucket/changing", "storage_options": store}
    rows = [json.dumps({"prompt": f"w{n}", "completion": f" w{n + 1}"}) + "\n" for n in range(10, 50)]

    def print_of() -> str:
        system.invalidate_cache()
        cache = TextCache.at(tmp_path / "cache", workers=1)
        return read(spec, tiny_tokenizer(), TextRules(32), cache=cache).fingerprint

    system.pipe("bucket/changing/a.jsonl", "".join(rows).encode())
    first = print_of()
    assert print_of() == first
    system.pipe("bucket/changing/a.jsonl", "".join(reversed(rows)).encode())  # as long as before
    assert print_of() != first
    system.pipe("bucket/changing/a.jsonl", "".join(rows).encode())
    assert print_of() == first


def test_a_store_that_refuses_or_is_away_is_named_without_credentials(tmp_path, pair, store):
    for path, options in (
        ("s3://nobody/none.jsonl", store),
        ("s3://bucket/none.jsonl", store),
        ("s3://bucket/a.jsonl", {"client_kwargs": {"endpoint_url": "http://127.0.0.1:9", "region_name": "us-east-1"},
                                 "config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}}),
    ):  # fmt: skip
        with pytest.raises(DataError, match=path) as failed:
            dataset_source({"path": path, "storage_options": options}, tiny_tokenizer(), TextRules(32))
        assert SECRET not in str(failed.value)


@pytest.mark.parametrize(
    "source",
    [
        {"path": "s3://b/a.jsonl", "storage_options": {"client_kwargs": {"aws_secret_access_key": SECRET}}},
        {"path": "s3://b/a.jsonl", "storage_options": {"secret": SECRET}},
        {"path": f"https://user:{SECRET}@host/a.jsonl"},
        {"path": f"https://host/a.jsonl?X-Amz-Signature={SECRET}"},
        {"path": f"https://host/a.jsonl?token={SECRET}"},
    ],
)
def test_credentials_in_a_recipe_are_refused_and_not_shown(tmp_path, pair, source):
    for data in ({"sources": [source]}, {"evaluation": source}):
        with pytest.raises(ConfigError, match="environment") as failed:
            recipe_from(recipe_of(pair, data=data, training={"output_dir": "r", "max_steps": 1}))
        assert SECRET not in str(failed.value)


class InParts(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; with ``parts`` also bytes of a file."""

    parts = True

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        wanted = self.headers.get("Range") if self.parts else None
        if wanted is None:
            return super().do_GET()
        content = Path(self.translate_path(self.path)).read_bytes()
        first, last = (int(one or len(content)) for one in wanted.removeprefix("bytes=").split("-"))
        part = content[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        if self.parts:
            self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


@pytest.mark.parametrize("parts", [True, False])
def test_files_behind_a_web_server_are_read_and_streamed(tmp_path, parts):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"prompt": f"w{n % 50}", "completion": f" w{n % 7}"} for n in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100)
    kind = type("Kind", (InParts,), {"parts": parts})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(kind, directory=str(tmp_path))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name in ("a.jsonl", "a.parquet"):
            spec = {"path": f"http://127.0.0.1:{server.server_port}/{name}"}
            cache = TextCache.at(tmp_path / "cache", workers=1)
            here = dataset_source(
                {"path": str(tmp_path / name)}, tiny_tokenizer(), TextRules(32), cache=cache
            )
            (about,) = Place(spec["path"]).files()
            assert about.ranges == parts and "Last-Modified" in about.identity()
            far = dataset_source(spec, tiny_tokenizer(), TextRules(32), cache=cache)
            assert far.fingerprint == here.fingerprint
            streamed = streamed_source(spec, tiny_tokenizer(), TextRules(32), cache=cache).streamed
            assert streamed is not None
            chunks = streamed.chunks.index.rows
            places = [
                (chunk, record, 0) for chunk in range(len(chunks)) for record in range(chunks[chunk, 4])
            ]
            found = [example.input_ids for example in streamed.examples(places)]
            assert found == [example.input_ids for example in here.examples]
        server.shutdown()
