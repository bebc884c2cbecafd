"""What an evaluation was given so far, on disk: answers and verdicts, each under a key of everything it rests on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectkd.data.durable import add_lines, whole_lines
from selectkd.errors import DataError


@dataclass
class Memory:
    """The file ``path``, which grows by a line {"kept": {key: value, ...}, ...} for all that came at once.

    ``known``: key to value. What a killed run kept is there, and a line it was cut off in is as if it were not. Two
    processes may add to one file.
    """

    path: Path
    known: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def opened(cls, path: Path) -> Memory:
        """The memory of a file, which need not exist; DataError naming the line that is none of its own."""
        memory = cls(path)
        for number, line in enumerate(whole_lines(path), start=1):
            try:
                memory.known.update(dict(json.loads(line)["kept"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}:{number} is nothing an evaluation kept. Name another file with --memory, or delete it."
                ) from error
        return memory

    def keep(self, kept: Mapping[str, Any], **about: Any) -> None:
        """Adds values by their keys; they are on the disk when this returns. about: what a reader may want to know."""
        add_lines(self.path, [{"kept": dict(kept), **about}])
        self.known.update(kept)


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits of all that a value rests on, given as what JSON can hold.

    >>> key_of("a", {"b": 1}) == key_of("a", {"b": 1}) != key_of("a", {"b": 2})
    True
    """
    content = json.dumps(parts, sort_keys=True, ensure_ascii=True).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
