"""Records from files: JSON Lines, JSON arrays, Parquet, each plain or gzip, and Hugging Face data sets.

Every record keeps its origin, ``file:line``, so that a later error can name it. This module imports no tensor
library.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selectkd.data.detection import FORMATS, LABELLED, left_aside, matching_formats, verdict_of
from selectkd.data.folders import SUFFIXES, TABLES, files_of
from selectkd.errors import ConfigError, DataError

OnBad = Literal["error", "skip"]
WORDS = (
    "true", "false", "0", "1", "-1", "0.0", "1.0", "no", "yes", "good", "bad", "desirable", "chosen", "rejected",
)  # fmt: skip
"""Labels that may say whether an answer is good."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass
class Records:
    """Rows as dictionaries with ``origins`` beside them; ``summary`` is one line on what was read and detected."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    format: str = ""
    summary: str = ""
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return zip(self.origins, self.rows, strict=True)


Item = tuple[str, Any]  # (origin, record) or (origin, DataError)


def read_records(
    path: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    format: str | None = None,
    limit: int | None = None,
    on_bad_record: OnBad = "error",
) -> Records:
    """At most ``limit`` records of a file, a folder of files, a saved data set or a Hugging Face id.

    ``format`` (a key of FORMATS) overrides detection. With ``on_bad_record="skip"`` a record that cannot be
    read is left out and its message kept in ``skipped``. Raises DataError with file:line otherwise, and
    always for an empty source, for two formats in one source, and for a file whose compression is damaged.
    """
    if on_bad_record not in ("error", "skip"):
        raise ConfigError(f"on_bad_record is {on_bad_record!r}. What would work: error, skip.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}. What would work: a whole number of at least 1, or no limit.")
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"format is {format!r}.{hint} What would work: {', '.join(FORMATS)}.")
    items = _items(str(path), split, config)
    return records_of(items, str(path), format=format, limit=limit, on_bad_record=on_bad_record)


def records_of(
    items: Iterable[Item],
    path: str,
    *,
    format: str | None = None,
    limit: int | None = None,
    on_bad_record: OnBad = "error",
) -> Records:
    """``read_records`` of rows at hand, each with its origin; path: the name of their source in messages."""
    records = Records()
    examples: dict[tuple[str, ...], tuple[str, Any]] = {}
    for origin, item in items:
        problem = item if isinstance(item, DataError) else None
        record: dict[str, Any] = {} if isinstance(item, DataError) else item
        found = (format,) if format else () if problem else matching_formats(record)
        if problem is None and not found:
            names = ", ".join(sorted(map(str, record))[:12]) or "none"
            problem = DataError(
                f"{origin}: no known format; fields: {names}.\nWhat would work: {', '.join(FORMATS)}."
            )
        labelled = format is None and len(found) == 1 and set(found) <= set(LABELLED)
        if problem is None and labelled and _verdict(record):
            problem = DataError(
                f"{origin}: the row has the label {verdict_of(record)!r}. If it says whether the answer is good, make "
                f"it true or false.\nIf it does not, set `format: {next(iter(found))}` in the source."
            )
        if problem is not None:
            if on_bad_record == "error":
                raise problem
            records.skipped.append(str(problem).splitlines()[0])
            continue
        examples.setdefault(found, (origin, record))
        records.rows.append(record)
        records.origins.append(origin)
        if limit is not None and len(records.rows) >= limit:
            break
    if not records.rows:
        skipped = records.skipped
        bad = f" ({len(skipped)} bad ones skipped; the first: {skipped[0]})" if skipped else ""
        raise DataError(f"{path}: no records{bad}. Give a file with at least one record.")
    records.format = _one_format(path, examples)
    how = "given" if format else "detected"
    records.summary = f"{path}: {len(records)} records, format {records.format} ({how})"
    files = list(dict.fromkeys(origin.rpartition(":")[0] for origin in records.origins))
    if Path(path).is_dir() and files != [str(path)]:
        names = [str(Path(file).relative_to(path)) for file in files if Path(file).is_relative_to(path)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        records.summary += f", from {', '.join(names[:3])}{more}"
    aside = list(dict.fromkeys(name for row in records.rows for name in left_aside(row, records.format)))
    if aside:
        records.summary += f"; not part of the text: {', '.join(aside)}"
    if records.skipped:
        records.summary += f", {len(records.skipped)} bad records skipped"
    return records


def _one_format(path: str, examples: Mapping[tuple[str, ...], tuple[str, Any]]) -> str:
    """The single format of a source, or DataError with two rows that show why there is none."""
    kinds = list(examples)
    if len(kinds) == 1 and len(kinds[0]) == 1:
        return kinds[0][0]
    if len(kinds) == 1:
        origin, record = examples[kinds[0]]
        raise DataError(
            f"{path}: rows have the fields of {len(kinds[0])} formats ({', '.join(kinds[0])}), for example\n"
            f"  {origin}: {_fields(record)}\n"
            f"Say which one is meant with `format: {kinds[0][0]}` in the source."
        )
    lines = [
        f"  {examples[kind][0]}: {' and '.join(kind)}, fields {_fields(examples[kind][1])}"
        for kind in kinds[:2]
    ]
    raise DataError(
        f"{path}: more than one format in one source, for example\n"
        + "\n".join(lines)
        + "\nPut each format in a source of its own, or name one with `format:`."
    )


def _verdict(record: Mapping[str, Any]) -> bool:
    """Whether a row's label looks like true or false written as a number or a word."""
    return str(verdict_of(record)).strip().lower().removeprefix("un") in WORDS


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(name) for name, value in record.items() if value is not None))[:120]


def _items(path: str, split: str | None, config: str | None) -> Iterator[Item]:
    """Every (origin, record) of the source; a record that cannot be read is a DataError in its place."""
    place = Path(path)
    if place.is_dir():
        if (place / "dataset_dict.json").exists() or (place / "state.json").exists():
            yield from _saved(place, split)
            return
        for file in files_of(place, split, config):
            yield from _file(file)
        return
    if place.exists():
        yield from _file(place)
        return
    kinds = tuple(ending for suffix in SUFFIXES for ending in (suffix, f"{suffix}.gz"))
    if place.name.lower().endswith(kinds) or place.is_absolute() or not HUB_ID.fullmatch(path):
        folder = place.parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        near = difflib.get_close_matches(place.name, names, n=1)
        hint = (
            f"Did you mean {folder / near[0]}?"
            if near
            else "Give a file, a folder, or a Hugging Face data set id."
        )
        raise DataError(f"{path}: no such file or folder. {hint}")
    yield from _hub(path, split, config)


def _file(file: Path) -> Iterator[Item]:
    name = file.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _parquet(file)
        elif name.removesuffix(".gz").endswith((".jsonl", ".json", ".ndjson")):
            with gzip.open(file) if name.endswith(".gz") else file.open("rb") as stream:
                yield from _json(file, stream)
        elif name.endswith(TABLES):
            raise DataError(_convert(file))
        else:
            raise DataError(
                f"{file}: unknown kind of file. What would work: {', '.join(SUFFIXES)} (JSON also .gz)."
            )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read: {error}. Fetch or write the file again.") from error


def _convert(file: Path) -> str:
    """The message for a table of text: how to convert it."""
    sign = ", delimiter=chr(9)" if file.suffix.lower() == ".tsv" else ""
    out = file.with_suffix(".jsonl").name
    return (
        f"{file}: a table of text has no types and is not read. Write it as JSON Lines:\n"
        f'python -c "import csv, json; [print(json.dumps(row)) for row in '
        f"csv.DictReader(open('{file}', newline='', encoding='utf-8-sig'){sign})]\" > {out}\n"
        f"with columns such as prompt and completion, and name {out}."
    )


def _json(file: Path, stream: Any) -> Iterator[Item]:
    head = stream.read(64)
    if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(f"{file}:1: the file is UTF-16. Save it as UTF-8.")
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    stream.seek(0)
    lines = iter(stream)
    offset, number = 0, 0
    for raw in lines:
        number += 1
        body = raw[start:] if number == 1 else raw
        if body.lstrip()[:1] == b"[" and not _is_one_row(body):
            yield from _array(file, body + stream.read(), number)
            return
        if body.strip():
            yield from _line(file, body, number, offset + (start if number == 1 else 0))
            offset += len(raw)
            break
        offset += len(raw)
    for raw in lines:
        number += 1
        if raw.strip():
            yield from _line(file, raw, number, offset)
        offset += len(raw)


def _is_one_row(body: bytes) -> bool:
    """Whether a first line with an opening bracket is a bad row of JSON Lines, not a JSON array of rows."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return not isinstance(value, list) or (
        bool(value) and not any(isinstance(item, Mapping) for item in value)
    )


def _line(file: Path, raw: bytes, number: int, offset: int) -> Iterator[Item]:
    origin = f"{file}:{number}"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        yield (
            origin,
            DataError(f"{origin}: not UTF-8 at byte {offset + error.start} of the file. Save it as UTF-8."),
        )
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        cut = "" if raw.endswith(b"\n") else " (the last line may be cut short)"
        yield origin, DataError(f"{origin}: not valid JSON: {error.msg} at column {error.colno}{cut}.")
        return
    except (ValueError, RecursionError) as error:
        yield origin, DataError(f"{origin}: not usable JSON: {str(error)[:80]}.")
        return
    yield origin, _object(value, origin)


def _object(value: Any, origin: str) -> Any:
    if isinstance(value, dict):
        return value
    return DataError(f"{origin}: needs a JSON object, not {type(value).__name__} {repr(value)[:40]}.")


def _array(file: Path, raw: bytes, number: int) -> Iterator[Item]:
    """The items of a JSON array, each with the line it begins on; ``number`` is the line of the bracket."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + raw[: error.start].count(b"\n")
        yield f"{file}:{line}", DataError(f"{file}:{line}: not UTF-8. Save the file as UTF-8.")
        return
    decoder = json.JSONDecoder()
    space = re.compile(r"[ \t\r\n]*")

    def after_space(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    position, counted, line = text.index("[") + 1, 0, number
    position = after_space(position)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        origin = f"{file}:{line}"
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            at = line + (
                text.count("\n", counted, error.pos) if isinstance(error, json.JSONDecodeError) else 0
            )
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)[:80]
            yield f"{file}:{at}", DataError(f"{file}:{at}: the JSON array breaks off here: {reason}.")
            return
        yield origin, _object(value, origin)
        position = after_space(position)
        if text[position : position + 1] == ",":
            position = after_space(position + 1)
        elif text[position : position + 1] != "]":
            at = line + text.count("\n", counted, position)
            yield (
                f"{file}:{at}",
                DataError(f"{file}:{at}: the JSON array needs a comma or its closing bracket here."),
            )
            return
    if text[position + 1 :].strip():
        at = line + text.count("\n", counted, position)
        yield f"{file}:{at}", DataError(f"{file}:{at}: text after the end of the JSON array.")


def _parquet(file: Path) -> Iterator[Item]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{file}:row {number}", without_nulls(row)
                    number += 1
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{file}:row {number}: not readable as Parquet: {str(error)[:120]}.") from error


def without_nulls(value: Any) -> Any:
    """A row of Arrow without the nulls it invents: a struct has the fields of all rows of its column.

    >>> without_nulls({"a": [{"x": 1, "y": None}, {"x": None, "y": 2}], "b": {"z": None}})
    {'a': [{'x': 1}, {'y': 2}]}
    """
    if isinstance(value, Mapping):
        kept = {name: without_nulls(each) for name, each in value.items() if each is not None}
        return {name: each for name, each in kept.items() if each != {} or value[name] == {}}
    return [without_nulls(each) for each in value] if isinstance(value, list | tuple) else value


def _saved(folder: Path, split: str | None) -> Iterator[Item]:
    """A data set written by ``save_to_disk``."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder}: cannot be loaded as a saved data set: {str(error)[:120]}.") from error
    if isinstance(loaded, datasets.DatasetDict):
        name = split or ("train" if "train" in loaded else next(iter(loaded)) if len(loaded) == 1 else None)
        if name not in loaded:
            raise DataError(
                f"{folder}: no split {name or 'train'!r}. Its splits: {', '.join(map(str, loaded))}."
            )
        loaded, folder = loaded[name], folder / str(name)
    for number, row in enumerate(loaded):
        yield f"{folder}:row {number}", without_nulls(dict(row))


def _hub(name: str, split: str | None, config: str | None) -> Iterator[Item]:
    """A data set of the Hugging Face hub; loading scripts (remote code) are never run."""
    import datasets
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import HfHubHTTPError

    wanted = split or "train"
    try:
        loaded = datasets.load_dataset(name, config, split=wanted)
    except (OSError, ValueError, RuntimeError, DatasetsError, HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name}: no file or folder has this name, and as a Hugging Face data set (config {config}, split "
            f"{wanted}) it cannot be loaded: {reason}\n"
            "Check the id, `config:` and `split:`, the network, or give a local file or folder."
        ) from error
    for number, row in enumerate(loaded):
        yield f"{name}[{wanted}]:row {number}", without_nulls(dict(row))
