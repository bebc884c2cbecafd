"""Records of a source, checked: each keeps its origin, ``file:line``, so that a later error can name it.

This module imports no tensor library.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from selectkd.data.chunks import Chunk, Item, Place, chunks
from selectkd.data.detection import FORMATS, LABELLED, left_aside, matching_formats, no_format, verdict_of
from selectkd.errors import ConfigError, DataError

OnBad = Literal["error", "skip"]
WORDS = (
    "true", "false", "0", "1", "-1", "0.0", "1.0", "no", "yes", "good", "bad", "desirable", "chosen", "rejected",
)  # fmt: skip
"""Labels that may say whether an answer is good."""
LABELS = ("unpaired_preference",)
SHOWN = 20
"""Messages of bad records that are kept; all of them are counted."""


@dataclass
class Found:
    """What was found in records: how many are good and how many bad, their format with an example of it, messages of
    bad ones, the fields that are no part of the text, the files they come from.
    """

    good: int = 0
    bad: int = 0
    formats: tuple[str, ...] = ()
    example: tuple[str, str] = ("", "")
    problems: list[str] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def add(self, other: Found) -> None:
        """Takes in what was found in later records of the same source. DataError where they have another format."""
        self.good, self.bad = self.good + other.good, self.bad + other.bad
        if not self.formats:
            self.formats, self.example = other.formats, other.example
        elif other.formats and other.formats != self.formats:
            raise _mixed(self, other.formats, other.example)
        self.problems = [*self.problems, *other.problems][:SHOWN]
        self.aside = list(dict.fromkeys([*self.aside, *other.aside]))
        self.files = list(dict.fromkeys([*self.files, *other.files]))

    @property
    def format(self) -> str:
        """The one format of the records."""
        return self.formats[0] if self.formats else ""

    def summary(self, path: str, *, given: bool) -> str:
        """A line on the records of ``path``; given: the recipe names their format. DataError where there are none."""
        if not self.good:
            bad = f" ({self.bad} bad ones skipped; the first: {self.problems[0]})" if self.bad else ""
            raise DataError(f"{path}: no records{bad}. Give a file with at least one record.")
        text = f"{path}: {self.good} records, format {self.format} ({'given' if given else 'detected'})"
        if Path(path).is_dir() and self.files != [path]:
            names = [
                str(Path(file).relative_to(path)) for file in self.files if Path(file).is_relative_to(path)
            ]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            text += f", from {', '.join(names[:3])}{more}"
        if self.aside:
            text += f"; not part of the text: {', '.join(self.aside)}"
        return text + (f", {self.bad} bad records skipped" if self.bad else "")


class Checked:
    """The good ones of ``items``, in order, with their origins; ``found`` grows while they are read.

    format: of the recipe, None to detect it. before: what was found in earlier records of the source. limit: the most
    good records. Raises DataError with file:line for a bad record unless they are skipped, and always for a second
    format.
    """

    def __init__(
        self,
        items: Iterable[Item],
        *,
        format: str | None = None,
        limit: int | None = None,
        on_bad_record: OnBad = "error",
        before: Found | None = None,
    ) -> None:
        self.items, self.named, self.limit, self.on_bad_record = items, format, limit, on_bad_record
        self.found = Found()
        if before is not None:
            self.found.formats, self.found.example = before.formats, before.example

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        found, aside, files = self.found, {}, {}
        if self.limit == 0:
            return
        for origin, item in self.items:
            problem = item if isinstance(item, DataError) else self._problem(origin, item)
            if problem is not None:
                self.refuse(problem)
                found.bad += 1
                continue
            record: dict[str, Any] = item  # type: ignore[assignment]
            found.good += 1
            aside.update(dict.fromkeys(left_aside(record, found.format)))
            files.setdefault(origin.rpartition(":")[0])
            found.aside, found.files = list(aside), list(files)
            yield origin, record
            if found.good == self.limit:
                return

    def refuse(self, problem: DataError) -> None:
        """Raises ``problem`` of a record, or keeps its message where bad records are skipped."""
        if self.on_bad_record == "error":
            raise problem
        if len(self.found.problems) < SHOWN:
            self.found.problems.append(str(problem).splitlines()[0])

    def _problem(self, origin: str, record: dict[str, Any]) -> DataError | None:
        """Why a record is bad; raises DataError where the source has a second format, or a row that of two."""
        found, formats = self.found, (self.named,) if self.named else matching_formats(record)
        if not formats:
            return no_format(record, origin)
        if found.formats == LABELS and formats[0] in LABELLED and verdict_of(record) is None:
            return DataError(
                f"{origin}: the row has no label, and rows before it have one. Make it true or false, or leave such "
                "rows out with `on_bad_record: skip`."
            )
        if self.named is None and len(formats) == 1 and formats[0] in LABELLED and _verdict(record):
            return DataError(
                f"{origin}: the row has the label {verdict_of(record)!r}. If it says whether the answer is good, make "
                f"it true or false.\nIf it does not, set `format: {formats[0]}` in the source."
            )
        example = (origin, _fields(record))
        if len(formats) > 1:
            raise DataError(
                f"{origin}: the row has the fields of {len(formats)} formats ({', '.join(formats)}): {example[1]}\n"
                f"Say which one is meant with `format: {formats[0]}` in the source."
            )
        if found.formats and formats != found.formats:
            raise _mixed(found, formats, example)
        if not found.formats:
            found.formats, found.example = formats, example
        return None


@dataclass
class Records:
    """Records in memory with ``origins`` beside them; ``summary`` is one line on what was read and detected."""

    rows: list[dict[str, Any]]
    origins: list[str]
    format: str
    summary: str
    skipped: list[str]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return zip(self.origins, self.rows, strict=True)


def read_records(
    path: str | Path,
    *,
    split: str | None = None,
    config: str | None = None,
    revision: str | None = None,
    format: str | None = None,
    limit: int | None = None,
    on_bad_record: OnBad = "error",
    storage_options: Mapping[str, Any] | None = None,
) -> Records:
    """At most ``limit`` records of a file, a folder of files, a saved data set or a Hugging Face id, in memory.

    ``format`` (a key of FORMATS) overrides detection. With ``on_bad_record="skip"`` a record that cannot be
    read is left out and its message kept in ``skipped`` (of the first 20). Raises DataError with file:line otherwise,
    and always for an empty source, for two formats in one source, and for a file whose compression is damaged.
    """
    check_reading(format, limit, on_bad_record)
    place = Place(str(path), split, config, revision, storage_options or {})
    checked = Checked(items_of(chunks(place)), format=format, limit=limit, on_bad_record=on_bad_record)
    pairs = list(checked)
    summary = checked.found.summary(str(path), given=format is not None)
    return Records(
        [record for _, record in pairs], [origin for origin, _ in pairs], checked.found.format, summary,
        checked.found.problems,
    )  # fmt: skip


def items_of(parts: Iterable[Chunk]) -> Iterator[Item]:
    """The items of chunks, one after the other."""
    return (item for chunk in parts for item in chunk.items())


def check_reading(format: str | None, limit: int | None, on_bad_record: str) -> None:
    """ConfigError for a value that cannot be."""
    if on_bad_record not in ("error", "skip"):
        raise ConfigError(f"on_bad_record is {on_bad_record!r}. What would work: error, skip.")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}. What would work: a whole number of at least 1, or no limit.")
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"format is {format!r}.{hint} What would work: {', '.join(FORMATS)}.")


def _mixed(found: Found, formats: tuple[str, ...], example: tuple[str, str]) -> DataError:
    way = "Put each format in a source of its own, or name one with `format:`."
    if LABELS in (formats, found.formats) and {*formats, *found.formats} - {*LABELS} <= {*LABELLED}:
        way = (
            "Give every row a label, true or false. `format: unpaired_preference` with `on_bad_record: skip` leaves "
            "out the\nrows without one."
        )
    return DataError(
        "more than one format in one source, for example\n"
        f"  {found.example[0]}: {' and '.join(found.formats)}, fields {found.example[1]}\n"
        f"  {example[0]}: {' and '.join(formats)}, fields {example[1]}\n"
        f"{way}"
    )


def _verdict(record: Mapping[str, Any]) -> bool:
    """Whether a row's label looks like true or false written as a number or a word."""
    return str(verdict_of(record)).strip().lower().removeprefix("un") in WORDS


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(sorted(str(name) for name, value in record.items() if value is not None))[:120]
