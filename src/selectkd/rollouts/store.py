"""Generated text on disk: one JSON record a line, of one run of a model, that is added to until it is whole.

A record is a row of the format ``tokens`` (input_ids, completion_mask), and says besides who wrote it and how:
written_by, model, revision, sampling, seed, copy, ended, and ``shown``, the same as text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectkd.data.durable import add_lines, whole_lines
from selectkd.errors import DataError
from selectkd.rollouts.generate import prompt_key

SAME = ("written_by", "model", "revision", "sampling", "seed")
"""What all records of one writer in a file have in common."""


@dataclass
class TextStore:
    """The records of ``path``. A line cut short by a kill is dropped; ``known`` are the texts that are there."""

    path: Path
    known: set[tuple[str, int]] = field(default_factory=set)
    _facts: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def opened(cls, path: Path) -> TextStore:
        """The store of a file, which need not exist; DataError naming the line that is no record."""
        store = cls(path)
        for number, line in enumerate(whole_lines(path), start=1):
            store._take(line, number)
        return store

    def _take(self, line: bytes, number: int) -> None:
        try:
            record = json.loads(line)
            ids, mask = record["input_ids"], record["completion_mask"]
            facts = {name: record[name] for name in SAME}
            prompt = ids[: mask.index(1) if 1 in mask else len(ids)]
            self.known.add((record["written_by"], prompt_key(prompt, record["copy"])))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self.path}:{number}: the line is not a record of generated text ({type(error).__name__}: {error}). "
                "Name another file."
            ) from None
        self._facts.setdefault(record["written_by"], facts)

    def check(self, facts: dict[str, Any]) -> None:
        """DataError where the file's records by this writer differ from ``facts`` in one of the keys SAME."""
        other = self._facts.get(facts["written_by"], facts)
        apart = [name for name in SAME if other[name] != facts[name]]
        if apart:
            name = apart[0]
            raise DataError(
                f"{self.path} holds text by {facts['written_by']} with {name} {other[name]!r}; this command has "
                f"{facts[name]!r}. Name another file, or generate with {name} {other[name]!r}."
            )
        self._facts.setdefault(facts["written_by"], facts)

    def holds(self, written_by: str, prompt: Sequence[int], copy: int) -> bool:
        """Whether a prompt's text is there."""
        return (written_by, prompt_key(prompt, copy)) in self.known

    def add(self, records: Iterable[dict[str, Any]]) -> None:
        """Appends records; they are on the disk when this returns."""
        added = list(records)
        add_lines(self.path, added)
        for record in added:
            ids, mask = record["input_ids"], record["completion_mask"]
            self.known.add((record["written_by"], prompt_key(ids[: mask.index(1)], record["copy"])))
