"""YAML 1.2 text to plain values, with the line of every key. Never constructs anything but plain values.

Refused: duplicate keys, keys that are not strings, tags beyond the core schema (``!!python/...``), several
documents, aliases beyond a small number, and anything large or deep enough to be an attack and no recipe.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from selectkd.errors import ConfigError

MOST_BYTES = 250_000
MOST_DEPTH = 32
MOST_ALIASES = 64
MOST_VALUES = 5_000
"""A recipe has some fifty values and is three levels deep; the limits leave two orders of magnitude. A text above
them is not parsed: the parser needs seconds for a megabyte."""

CORE = "tag:yaml.org,2002:"
Path = tuple[str | int, ...]


@dataclass
class Document:
    """Plain values, and the line (from 1) where each path stands."""

    value: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def line(self, path: Path) -> int | None:
        """The line of a path, or of the nearest one above it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None


def read(text: str, *, source: str) -> Document:
    """The one document of ``text``; ConfigError names ``source:line``.

    >>> read("a: {b: 1e-4}", source="recipe.yaml").value
    {'a': {'b': 0.0001}}
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{source}: {len(text):,} characters. A recipe has at most {MOST_BYTES:,}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ruamel warns of a reused anchor name, which is legal
            _survey(text, source)
            node = YAML(typ="safe", pure=True).compose(text)
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        raise _explained(error, text, source) from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"{source}: not YAML: {' '.join(str(error).split())[:200]}") from None
    document = Document(None)
    if node is not None:
        document.value = _Reader(source, document.lines).value(node, ())
    return document


def _survey(text: str, source: str) -> None:
    """Refuse depth, aliases, further documents and too many values while nothing has been built."""
    depth = aliases = documents = values = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        kind = type(event).__name__
        line = event.start_mark.line + 1 if event.start_mark else 1
        if kind == "DocumentStartEvent":
            documents += 1
            if documents > 1:
                raise ConfigError(f"{source}:{line}: a recipe is one YAML document; remove the second '---'.")
        elif kind == "ScalarEvent":
            values += 1
            if values > 2 * MOST_VALUES:  # with their keys
                raise ConfigError(
                    f"{source}:{line}: more than {MOST_VALUES:,} values, the most a recipe may have."
                )
        elif kind == "AliasEvent":
            aliases += 1
            if aliases > MOST_ALIASES:
                raise ConfigError(
                    f"{source}:{line}: more than {MOST_ALIASES} aliases (*name); write the values out."
                )
        elif kind in ("MappingStartEvent", "SequenceStartEvent"):
            depth += 1
            if depth > MOST_DEPTH:
                raise ConfigError(
                    f"{source}:{line}: nested deeper than {MOST_DEPTH} levels, the most a recipe may have."
                )
        elif kind in ("MappingEndEvent", "SequenceEndEvent"):
            depth -= 1


class _Reader:
    """Nodes to plain values. An alias is read anew each time it is met, so the count of values bounds all."""

    def __init__(self, source: str, lines: dict[Path, int]) -> None:
        self.source, self.lines = source, lines
        self.count = 0
        self.open: set[int] = set()

    def refuse(self, node: Node, message: str) -> ConfigError:
        return ConfigError(f"{self.source}:{node.start_mark.line + 1}: {message}")

    def value(self, node: Node, path: Path) -> Any:
        self.count += 1
        if self.count > MOST_VALUES:
            raise self.refuse(
                node,
                f"more than {MOST_VALUES:,} values with its aliases written out, the most a recipe may have.",
            )
        if id(node) in self.open:
            raise self.refuse(node, "an alias that contains itself; write the value out.")
        self.lines.setdefault(path, node.start_mark.line + 1)
        tag = str(node.tag)
        if isinstance(node, ScalarNode):
            return self.scalar(node, tag)
        self.open.add(id(node))
        try:
            if isinstance(node, SequenceNode) and tag == CORE + "seq":
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, MappingNode) and tag == CORE + "map":
                return self.mapping(node, path)
        finally:
            self.open.discard(id(node))
        raise self.refuse(node, f"the tag {tag!r} is not allowed; a recipe holds plain values only.")

    def mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        entries: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if str(key_node.tag) == CORE + "merge":
                for other in value_node.value if isinstance(value_node, SequenceNode) else [value_node]:
                    if not isinstance(other, MappingNode):
                        raise self.refuse(key_node, "'<<' merges mappings only.")
                    merged = {**self.value(other, path), **merged}
                continue
            if not isinstance(key_node, ScalarNode) or str(key_node.tag) != CORE + "str":
                shown = repr(key_node.value)[:40] if isinstance(key_node, ScalarNode) else "a collection"
                raise self.refuse(key_node, f"a key must be a word, got {shown}; quote it if it is meant.")
            key = key_node.value
            if key in entries:
                raise self.refuse(
                    key_node, f"the key {key!r} is here twice (first on line {first[key]}); keep one."
                )
            first[key] = line
            self.lines[(*path, key)] = line
            entries[key] = self.value(value_node, (*path, key))
        return {**merged, **entries}

    def scalar(self, node: ScalarNode, tag: str) -> Any:
        word = node.value
        try:
            if tag in (CORE + "str", CORE + "timestamp"):
                return word
            if tag == CORE + "null":
                return None
            if tag == CORE + "bool":
                return word.lower() == "true"
            if tag == CORE + "int":
                return _integer(word)
            if tag == CORE + "float":
                return _real(word)
        except (ValueError, KeyError):
            raise self.refuse(node, f"{word[:40]!r} is not a number that can be read.") from None
        raise self.refuse(node, f"the tag {tag!r} is not allowed; a recipe holds plain values only.")


def _integer(word: str) -> int:
    digits = word.replace("_", "")
    sign, body = (digits[0], digits[1:]) if digits[:1] in ("-", "+") else ("", digits)
    base = {"0b": 2, "0o": 8, "0x": 16}.get(body[:2].lower(), 10)
    return int(sign + (body[2:] if base != 10 else body), base)


def _real(word: str) -> float:
    digits = word.replace("_", "").lower()
    special = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf, ".nan": math.nan}
    return special[digits] if digits in special else float(digits)


def _explained(error: MarkedYAMLError, text: str, source: str) -> ConfigError:
    """The parser's error in the user's words, with the line."""
    mark = error.problem_mark or error.context_mark
    number = mark.line + 1 if mark else 1
    rows = text.splitlines()
    row = rows[number - 1] if number <= len(rows) else ""
    where = f"{source}:{number}"
    if "\t" in row[: len(row) - len(row.lstrip())] or "'\\t'" in str(error.problem):
        return ConfigError(
            f"{where}: the indentation has a tab, and YAML allows spaces only. Replace it with spaces."
        )
    reason = " ".join(str(error.problem or error.context or "cannot be read").split())
    return ConfigError(f"{where}: not YAML: {reason[:160]}. The line is {row.strip()[:60]!r}.")
