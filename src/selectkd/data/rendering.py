"""Chunks of records become rows of Arrow: parsed, rendered, tokenised and counted, in whichever process is free."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from selectkd.data.chat import Sight
from selectkd.data.chunks import Chunk, Item
from selectkd.data.encoding import Encoder
from selectkd.data.example import Dropped, Example
from selectkd.data.examples import batch_of
from selectkd.data.files import Checked, Found
from selectkd.data.formats import to_sample
from selectkd.data.render import TextRules, rendering
from selectkd.data.rounds import Steps, together
from selectkd.data.routes import Routes
from selectkd.data.template import ChatTemplate
from selectkd.errors import DataError

WITHOUT_TOOLS = (
    "without their tool schemas, which the chat template leaves out (data.chat_template names another)"
)
PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow")
"""Packages whose versions may change the text or its tokens."""
TOGETHER, LARGE, BATCH = 256, 1 << 20, 2048
"""Records that are rendered and tokenised together, and characters of their text: most of the words of so many come
more than once, and a question to another process costs less than a hundredth of what it asks for. Examples that become
rows together: each has many times the memory of its row."""


@dataclass(frozen=True)
class Rendering:
    """How records of a source become examples: see ``selectkd.data.sources.dataset_source``."""

    tokenizer: Any
    template: ChatTemplate
    rules: TextRules
    eos_ids: Collection[int] = ()
    written_by: str | None = None
    routes: Routes | None = None
    format: str | None = None
    sight: Sight | None = None

    def identity(self) -> dict[str, Any]:
        """All that an example rests on beside its record, as plain data."""
        special = {name: str(value) for name, value in self.template.special.items()}
        return {
            "rules": asdict(self.rules),
            "written_by": self.written_by,
            "format": self.format,
            "eos_ids": sorted(self.eos_ids),
            "routes": None if self.routes is None else list(self.routes.when),
            "template": self.template.fingerprint,
            "special": special,
            "date": self.template.moment if self.template.dated else None,
            "tokenizer": _tokenizer_identity(self.tokenizer),
            "code": code_identity(),
            **({} if self.sight is None else {"images": _sight_identity(self.sight)}),
            "versions": {name: metadata.version(name) for name in PACKAGES},
        }

    @cached_property
    def encoder(self) -> Encoder:
        """The tokenizer with what it remembers."""
        return Encoder(self.tokenizer)

    def examples(
        self, records: Sequence[tuple[str, Mapping[str, Any]]], format: str, *, until_error: bool = False
    ) -> list[list[Example | Dropped] | DataError]:
        """The examples of each record, or why there are none; ``until_error``: up to the first record with an error,
        which names its origin.
        """
        work = [self._steps(record, format, origin) for origin, record in records]
        return together(work, self.template.answers, self.encoder, until_error=until_error)

    def _steps(self, record: Mapping[str, Any], format: str, origin: str) -> Steps[list[Example | Dropped]]:
        if self.written_by is not None and record.get("written_by") != self.written_by:
            return [Dropped(origin, "by another writer")]
        sample = to_sample(record, format, origin=origin)
        found = yield from rendering(
            sample, self.encoder, self.rules, self.template, self.eos_ids, self.sight
        )
        if self.routes is None:
            return found
        teacher = self.routes(record, origin)
        return [replace(one, route=teacher) if isinstance(one, Example) else one for one in found]


@dataclass
class Part:
    """What became of a chunk: what was found, what was counted, the ends of turns, and its rows as Arrow messages."""

    found: Found
    counts: Counter[str] = field(default_factory=Counter)
    ends: list[int] = field(default_factory=list)
    examples: int = 0
    rows: bytes = b""

    def as_dict(self) -> dict[str, Any]:
        """All but the rows, as plain data."""
        return {
            "found": asdict(self.found), "counts": dict(self.counts), "ends": self.ends, "examples": self.examples,
        }  # fmt: skip

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Part:
        """What ``as_dict`` gave."""
        found = Found(**content["found"])
        found.formats, found.example = tuple(found.formats), tuple(found.example)  # type: ignore[assignment]
        return cls(found, Counter(content["counts"]), list(content["ends"]), content["examples"])

    def take(self, examples: list[Example]) -> None:
        """Moves the examples to the rows."""
        if examples:
            self.rows += batch_of(examples).serialize().to_pybytes()
            self.examples += len(examples)
            examples.clear()

    def add(self, later: Part) -> None:
        """Takes in the counts of the next chunk, not its rows."""
        self.found.add(later.found)
        self.counts.update(later.counts)
        self.ends = sorted({*self.ends, *later.ends})
        self.examples += later.examples


def part_of(chunk: Chunk, how: Rendering, *, limit: int | None = None, before: Found | None = None) -> Part:
    """The examples of a chunk's first ``limit`` good records; before: what was found in earlier chunks.

    Raises DataError with file:line for a record that cannot be trained on, unless such records are skipped.
    """
    checked = Checked(
        chunk.items(), format=how.format, limit=limit, on_bad_record=how.rules.on_bad_record, before=before
    )
    part, rules = Part(checked.found), how.rules
    counts, examples = part.counts, list[Example]()
    cut_prompt = f"prompts cut to max_prompt_length {rules.max_prompt_length}"
    cut = f"cut to max_length {rules.max_length}"
    for found in rendered(checked, how):
        counts["bad"] += found is None
        for one in found or ():
            if isinstance(one, Dropped):
                counts[one.reason] += 1
                continue
            counts["truncated"] += one.truncated
            counts[cut_prompt] += one.cut_prompt
            counts[cut] += one.truncated and len(one) == rules.max_length
            counts[WITHOUT_TOOLS] += one.without_tools
            examples.append(one)
        if len(examples) >= BATCH:
            part.take(examples)
    part.ends = sorted(set().union(*how.template.ends.values()))
    part.take(examples)
    return part


def rendered(checked: Checked, how: Rendering) -> Iterator[list[Example | Dropped] | None]:
    """What each good record becomes; None where it cannot be trained on, a DataError unless such are skipped."""
    for records, problem in _together(checked):
        strict = how.rules.on_bad_record == "error"
        for found in how.examples(records, checked.found.format, until_error=strict):
            if isinstance(found, DataError):
                checked.refuse(found)
            yield None if isinstance(found, DataError) else found
        if problem is not None:
            raise problem


def _together(checked: Iterable[Item]) -> Iterator[tuple[list[Item], DataError | None]]:
    """Records that are rendered together, and the error with which the reading of more of them ends."""
    records: list[Item] = []
    size = 0
    try:
        for origin, record in checked:
            records.append((origin, record))
            size += _characters(record)
            if len(records) == TOGETHER or size > LARGE:
                yield records, None
                records, size = [], 0
    except DataError as error:
        yield records, error
        return
    if records:
        yield records, None


def _characters(value: Any) -> int:
    """The characters of the texts of a value."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int | float):
        return sum(map(_characters, value))
    return 0


def _tokenizer_identity(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text becomes."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        about: Any = json.loads(backend.to_str())
        about.pop("truncation", None)
        about.pop("padding", None)
    else:
        about = sorted(tokenizer.get_vocab().items())
    apart = getattr(tokenizer, "split_special_tokens", False)
    parts = [type(tokenizer).__name__, about, str(tokenizer.special_tokens_map), apart]
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _sight_identity(sight: Sight) -> dict[str, Any]:
    rules = {**asdict(sight.rules), "folder": str(sight.rules.folder.expanduser().resolve())}
    return {**rules, "processor": sight.vision.fingerprint, "pillow": metadata.version("pillow")}


def code_identity() -> str:
    """A hash of this package's code between a record and its tokens."""
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
