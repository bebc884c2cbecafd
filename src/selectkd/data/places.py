"""Where a source is: a file, a folder or a saved data set, here or at a URL that fsspec knows, or a name of the hub."""

from __future__ import annotations

import difflib
import gzip
import io
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from selectkd.config.extras import how_to_install
from selectkd.data.folders import KINDS, PACKED, SUFFIXES, files_of, split_of
from selectkd.errors import ConfigError, DataError, SelectKDError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
CHANGES = ("ETag", "etag", "checksum", "sha256", "md5", "md5Hash", "Content-MD5", "Digest", "crc32c", "blob_id", "oid",
           "LastModified", "Last-Modified", "last_modified", "last_commit", "mtime", "created", "updated")  # fmt: skip
"""What file systems call the values that change with a file's content."""
SAVED = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
"""The files by which a folder is a saved data set of several splits, and of one."""
BLOCK = 1 << 20
"""Bytes that are read at once of a file that is not on a local disk."""


@dataclass(frozen=True)
class DataFile:
    """A file. url: where it is unless on a local disk, with the options of its file system. name: of it in messages.
    ranges: parts of it can be had; some servers of http send a file from its beginning alone.
    """

    path: str
    name: str
    url: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    ranges: bool = True

    @property
    def local(self) -> bool:
        return self.url is None

    @property
    def system(self) -> Any:
        """Its file system, anew in each process: a connection does not survive a fork."""
        import fsspec

        return fsspec.core.url_to_fs(self.url, **self.options)[0]

    @property
    def kind(self) -> str:
        """Its suffix without the compression's."""
        low = self.path.lower()
        bare = next((low.removesuffix(packed) for packed in PACKED if low.endswith(packed)), low)
        return next((suffix for suffix in SUFFIXES if bare.endswith(suffix)), "")

    @property
    def seekable(self) -> bool:
        """Whether any part of it can be read without what stands before."""
        return self.ranges and not self.path.lower().endswith(PACKED)

    def plain(self) -> Any:
        """Its bytes as a file, which can seek where parts can be had and in tables of Arrow and Parquet."""
        if self.local:
            return open(self.path, "rb")
        if self.ranges:
            return self.system.open(self.path, "rb")
        if self.kind in (".parquet", ".arrow"):
            return io.BytesIO(self.system.cat_file(self.path))
        return self.system.open(self.path, "rb", block_size=0)

    def part(self, start: int, size: int) -> bytes:
        """Some of its bytes, fewer at its end. DataError where it cannot be read."""
        with reading(self.name):
            if not self.local:
                return self.system.cat_file(self.path, start=start, end=start + size)
            with open(self.path, "rb") as file:
                file.seek(start)
                return file.read(size)

    def stream(self) -> BinaryIO:
        """Its bytes, unpacked."""
        raw = self.plain()
        low = self.path.lower()
        if low.endswith(".gz"):
            return _Owning(gzip.GzipFile(fileobj=raw), raw)
        if low.endswith(".zst"):
            return _Owning(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"), raw)
        return raw if self.local else _Owning(raw, raw)

    def identity(self) -> dict[str, str]:
        """What changes when the file does: of a local one its time, size and place on the disk, of another what its
        file system says of it; a file that says nothing is read.
        """
        if self.local:
            found = os.stat(self.path)
            values = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            return {"file": self.name, "stat": " ".join(map(str, values))}
        with reading(self.name):
            return {"file": self.name, **self._stated()}

    def _stated(self) -> dict[str, str]:
        about = self.system.info(self.path)
        stated = {key: str(about[key]) for key in CHANGES if about.get(key) is not None}
        if not stated:
            import xxhash

            digest = xxhash.xxh3_128()
            with self.plain() as stream:
                while block := stream.read(BLOCK):
                    digest.update(block)
            stated = {"content": digest.hexdigest()}
        return {"size": str(about.get("size")), **stated}


@contextmanager
def reading(name: str, what: str = "cannot be read") -> Iterator[None]:
    """DataError about ``name`` for whatever a file system raises: each has errors of its own libraries."""
    try:
        yield
    except SelectKDError:
        raise
    except Exception as error:
        if isinstance(error, ImportError) and name.startswith(("s3://", "s3a://")):
            raise ConfigError(f"{name} needs s3fs. Install it: {how_to_install('s3')}.") from error
        reason = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise DataError(
            f"{name}: {what}: {reason}. Check the file, its address and the credentials."
        ) from error


def _in_parts(system: Any, path: str) -> bool:
    """Whether a web server sends parts of a file."""
    with system.open(path, "rb", cache_type="none") as file:
        try:
            file.seek(1)
            file.read(1)
        except ValueError:
            return False
    return True


def _shown(name: str) -> str:
    r"""A file's name in messages and in the cache, which take no byte that is not UTF-8 and no control character.

    >>> print(_shown("a\udcff\n.jsonl"))
    a\udcff\x0a.jsonl
    """
    return "".join(
        one if one.isprintable() else (f"\\x{ord(one):02x}" if ord(one) < 256 else f"\\u{ord(one):04x}")
        for one in name
    )


class _Owning(io.BufferedReader):
    """A buffered reader that closes the file below it as well."""

    def __init__(self, stream: Any, below: Any) -> None:
        super().__init__(stream, BLOCK)
        self.below = below

    def close(self) -> None:
        super().close()
        self.below.close()


@dataclass(frozen=True)
class Rows:
    """A data set of the ``datasets`` library. name: what messages call it."""

    data: Any
    name: str

    def batches(self) -> Iterator[pa.RecordBatch]:
        """Its rows in Arrow."""
        for table in self.data.with_format("arrow").iter(batch_size=1024):
            yield from table.to_batches()

    def identity(self) -> dict[str, str]:
        """The fingerprint that the library keeps of it."""
        return {"data": self.name, "fingerprint": str(self.data._fingerprint)}


@dataclass(frozen=True)
class Place:
    """A path, URL or hub name, with what chooses among its data: split, configuration, revision. options: of fsspec."""

    path: str
    split: str | None = None
    config: str | None = None
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> list[DataFile] | Rows:
        """Its files in order, or the data set. Raises DataError where there is none, ConfigError for a choice."""
        if "://" in self.path:
            return self._remote()
        place = Path(self.path)
        if "*" in self.path and not place.exists():
            found = sorted(one for one in glob(self.path, recursive=True) if one.lower().endswith(KINDS))
            if not found:
                raise DataError(f"{self.path}: no data file matches. What would work: {', '.join(SUFFIXES)}.")
            return [DataFile(one, _shown(one)) for one in found]
        if place.is_dir():
            if any(all((place / name).exists() for name in names) for names in SAVED):
                return self._saved(self.path)
            names = [path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()]
            chosen = files_of(names, self.path, self.split, self.config)
            return [DataFile(str(place / name), _shown(str(place / name))) for name in chosen]
        if place.exists():
            if self.split not in (None, "train", split_of(place.name)):
                raise ConfigError(
                    f"{self.path} is a file, which has no split {self.split!r}. Name the file of that split, or its "
                    "folder."
                )
            return [self._one(DataFile(self.path, self.path))]
        if place.name.lower().endswith(KINDS) or place.is_absolute() or not HUB_ID.fullmatch(self.path):
            folder = place.parent
            names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
            near = difflib.get_close_matches(place.name, names, n=1)
            hint = (
                f"Did you mean {folder / near[0]}?"
                if near
                else "Give a file, a folder, or a Hugging Face data set id."
            )
            raise DataError(f"{self.path}: no such file or folder. {hint}")
        return self._hub()

    @staticmethod
    def _one(file: DataFile) -> DataFile:
        if not file.kind:
            raise DataError(
                f"{file.name}: unknown kind of file. What would work: {', '.join(SUFFIXES)}, each but the tables of "
                "Arrow and Parquet also with .gz or .zst."
            )
        return file

    def _remote(self) -> list[DataFile] | Rows:
        import fsspec

        with reading(self.path, "cannot be reached"), self._known():
            system, path = fsspec.core.url_to_fs(self.path, **self.options)
            if "*" in path:
                found = sorted(system.glob(path))
                chosen = [one for one in found if one.lower().endswith(KINDS)]
            elif system.isdir(path):
                if any(all(system.exists(f"{path}/{name}") for name in names) for names in SAVED):
                    return self._saved(self.path)
                below = path.rstrip("/") + "/"
                names = [one.removeprefix(below) for one in map(str, system.find(path))]
                chosen = [below + name for name in files_of(names, self.path, self.split, self.config)]
            else:
                chosen = [path] if system.exists(path) else []
        if not chosen:
            raise DataError(f"{self.path}: no such file. Check the address and credentials.")
        return [self._one(self._far(system, one)) for one in chosen]

    @contextmanager
    def _known(self) -> Iterator[None]:
        try:
            yield
        except (ImportError, ValueError) as error:
            if isinstance(error, SelectKDError):
                raise
            raise ConfigError(
                f"{self.path}: {error}. Check the URL, or install what its kind needs."
            ) from error

    def _far(self, system: Any, path: str) -> DataFile:
        url = str(system.unstrip_protocol(path))
        with reading(url):
            ranges = not url.startswith("http") or _in_parts(system, path)
        return DataFile(path, _shown(url), url, self.options, ranges)

    def _saved(self, folder: str) -> Rows:
        """A data set written by ``save_to_disk``."""
        import datasets

        try:
            loaded: Any = datasets.load_from_disk(folder, storage_options=dict(self.options) or None)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{folder}: cannot be loaded as a saved data set: {str(error)[:120]}.") from error
        if isinstance(loaded, datasets.DatasetDict):
            only = next(iter(loaded)) if len(loaded) == 1 else None
            name = self.split or ("train" if "train" in loaded else only)
            if name not in loaded:
                raise DataError(
                    f"{folder}: no split {name or 'train'!r}. Its splits: {', '.join(map(str, loaded))}."
                )
            return Rows(loaded[name], f"{folder}/{name}")
        return Rows(loaded, folder)

    def files(self) -> list[DataFile]:
        """Its files, those of a hub data set too, read where they are; nothing is copied to this disk."""
        if "://" in self.path or Path(self.path).exists() or not HUB_ID.fullmatch(self.path):
            found = self.open()
            if not isinstance(found, Rows):
                return found
            raise ConfigError(
                f"{self.path} is a saved data set, whose rows are not streamed. Set streaming to false."
            )
        import datasets
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        wanted = self.split or "train"
        try:
            builder = datasets.load_dataset_builder(self.path, self.config, revision=self.revision)
            urls = list((builder.config.data_files or {}).get(wanted) or ())
        except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.path}: its files cannot be listed: {reason}. Check the id and the network."
            ) from error
        if not urls:
            raise DataError(f"{self.path}: no files of split {wanted!r}; parts of a split are not streamed.")
        return [
            self._one(DataFile(url.partition("://")[2], url, url, self.options)) for url in map(str, urls)
        ]

    def _hub(self) -> Rows:
        """A data set of the Hugging Face hub; loading scripts (remote code) are never run."""
        import datasets
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        wanted = self.split or "train"
        try:
            loaded = datasets.load_dataset(self.path, self.config, split=wanted, revision=self.revision)
        except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"{self.path}: no file or folder has this name, and as a Hugging Face data set (config {self.config}, "
                f"split {wanted}) it cannot be loaded: {reason}\n"
                "Check the id, `config:`, `split:` and `revision:`, the network, or give a local file or folder."
            ) from error
        return Rows(loaded, f"{self.path}[{wanted}]")
