"""Where examples come from: a data set as a ``Source``, and the seeded batches of several of them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import xxhash

from selectkd.data.chat import Sight
from selectkd.data.chunk_index import Chunks, Index
from selectkd.data.chunks import Item, chunks, given
from selectkd.data.detection import FORMATS
from selectkd.data.example import Example
from selectkd.data.examples import SCHEMA, Examples, Table
from selectkd.data.files import Found, check_reading
from selectkd.data.images import ImageRules
from selectkd.data.order import BatchOptions, Epoch, draw
from selectkd.data.places import Place, Rows
from selectkd.data.prompts import bound_of
from selectkd.data.render import TextRules
from selectkd.data.rendering import Part, Rendering, part_of
from selectkd.data.routes import Routes
from selectkd.data.streaming import Streamed, StreamEpoch
from selectkd.data.template import ChatTemplate
from selectkd.data.text_cache import Text, TextCache, text_of
from selectkd.data.vision import Vision
from selectkd.errors import ConfigError, DataError

SPEC_KEYS = (
    "path", "name", "format", "weight", "split", "limit", "config", "revision", "storage_options", "stream",
    "written_by", "image_folder", "image_urls", "max_pixels",
)  # fmt: skip
FEW = 256
"""Records of a streamed source that are tokenised at its start, for the probe and for checks."""


@dataclass(frozen=True)
class Source:
    """Examples under a name. ``weight`` is how often an epoch has each: 1 once, 2 twice, 0.5 every other epoch.

    ``counts`` has the number of records read, kept, truncated, bad, and dropped for each reason; ``summary`` is one
    line on them; ``problems`` the messages of the first bad records. ``streamed``: reads the records as training goes
    on; ``examples`` are the first ones alone then.
    """

    examples: Examples
    name: str = "data"
    weight: float = 1.0
    format: str = ""
    summary: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    streamed: Streamed | None = None

    @classmethod
    def of(cls, examples: Iterable[Example], name: str = "data", weight: float = 1.0) -> Source:
        """Examples at hand as a source."""
        return cls(Examples.of(examples), name, weight)

    def __len__(self) -> int:
        return len(self.examples) if self.streamed is None else len(self.streamed.chunks.index)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def fingerprint(self) -> str:
        """A hash of every token id and mask in order, of streamed text of its files; 32 hexadecimal digits."""
        return self.examples.fingerprint if self.streamed is None else self.streamed.chunks.index.fingerprint


def dataset_source(
    spec: Mapping[str, Any],
    tokenizer: Any,
    rules: TextRules,
    *,
    eos_ids: Collection[int] = (),
    template: ChatTemplate | None = None,
    routes: Routes | None = None,
    data: Any = None,
    cache: TextCache | None = None,
    vision: Vision | None = None,
) -> Source:
    """The Source a recipe's entry describes: {path, name, format, weight, split, limit, config, written_by, ...}.

    eos_ids: what ends a turn beside the tokenizer's EOS and what the template writes. template: the tokenizer's, unless
    given. routes: the teacher of a record. data: a ``datasets.Dataset`` or records, in place of those at ``path``.
    cache: where the tokens are kept. Its second reading takes the tokens of the first.
    Raises ConfigError for a key or weight that cannot be, DataError naming file:line for a record that cannot be
    trained on (kept in ``problems`` instead under ``rules.on_bad_record="skip"``), and DataError when nothing is left.
    """
    entry, weight, how = _read_as(spec, tokenizer, rules, eos_ids, template, routes, vision)
    path, limit = str(entry["path"]), entry.get("limit")
    cache = TextCache.at() if cache is None else cache
    if data is None:
        place = _place(entry)
        found = place.open()
        identity = [found.identity()] if isinstance(found, Rows) else [file.identity() for file in found]
        text = text_of(path, identity, partial(chunks, place), how, cache, limit=limit)
    else:
        text = text_of(path, _identity(data), lambda: given(_items(data, path)), how, cache, limit=limit)
    return _source(text, how, path, _name(entry), weight, int(entry.get("stream", 0)))


def streamed_source(
    spec: Mapping[str, Any],
    tokenizer: Any,
    rules: TextRules,
    *,
    eos_ids: Collection[int] = (),
    template: ChatTemplate | None = None,
    routes: Routes | None = None,
    cache: TextCache | None = None,
    vision: Vision | None = None,
) -> Source:
    """As ``dataset_source``, of records that are tokenised as training goes on. Its ``examples`` are those of its first
    records alone; the index of its chunks is kept in ``cache``. Raises ConfigError for a saved data set.
    """
    entry, weight, how = _read_as(spec, tokenizer, rules, eos_ids, template, routes, vision)
    cache = TextCache.at() if cache is None else cache
    path = str(entry["path"])
    index = Index.of(_place(entry).files(), cache.folder)
    index = index if entry.get("limit") is None else index.first(entry["limit"])
    if not len(index):
        raise DataError(f"{path}: no records. Give a file with at least one record.")
    if weight * len(index.units) < 1:
        raise ConfigError(
            f"{path}: is streamed in {len(index.units)} parts, and weight {weight:g} takes none of them in an epoch. "
            "Raise the weight, split the file, or set streaming to false."
        )
    read = Chunks(index)
    part, number = Part(Found()), 0
    while not part.examples and number < len(index.rows):
        part.add(found := part_of(read.read(number), how, limit=FEW, before=part.found))
        part.rows, number = found.rows, number + 1
    if not part.examples:
        first = f"; the first bad one: {part.found.problems[0].rstrip('.')}" if part.found.problems else ""
        raise DataError(
            f"{path}: none of {len(index)} records can be trained on{first}. Look at `selectkd data check`."
        )
    stream = int(entry.get("stream", 0))
    table = pa.ipc.open_stream(SCHEMA.serialize().to_pybytes() + part.rows).read_all()
    named = "given" if how.format else "detected"
    summary = f"{path}: {len(index):,} records streamed, format {part.found.format} ({named})"
    if part.examples > part.found.good:
        summary += "; a conversation gives one of its samples an epoch, in turn"
    streamed = Streamed(read, how, replace(part.found, problems=[], aside=[], files=[]), stream)
    counts, first = {"read": len(index)}, Examples([Table(table, None, stream, vision)])
    return Source(first, _name(entry), weight, part.found.format, summary, counts, (), streamed)


def without_share(source: Source, share: float, most: int, cache: TextCache) -> tuple[Source, Examples]:
    """A streamed source without a share of its prompts, which hashes of their words decide, and the examples of at most
    ``most`` records that have one of these prompts.
    """
    assert source.streamed is not None
    streamed = replace(source.streamed, share=share)
    about = {"index": source.fingerprint, "share": share, "most": most}
    text = text_of(source.name, about, lambda: streamed.held_out(most), streamed.how, cache)
    text.table.stream = streamed.stream
    kept = source.examples.prompts[:, 0] >= bound_of(share)
    examples = source.examples.where(kept) if kept.any() else source.examples
    return replace(source, examples=examples, streamed=streamed), Examples([text.table])


def _read_as(
    spec: Mapping[str, Any],
    tokenizer: Any,
    rules: TextRules,
    eos_ids: Collection[int],
    template: ChatTemplate | None,
    routes: Routes | None,
    vision: Vision | None,
) -> tuple[dict[str, Any], float, Rendering]:
    """A source's entry without what it leaves out, its weight, and how its records become examples."""
    entry = {key: value for key, value in spec.items() if value is not None}
    unknown = sorted(set(entry) - set(SPEC_KEYS))
    if unknown or "path" not in entry:
        problem = f"unknown key {unknown[0]!r}" if unknown else "no path"
        raise ConfigError(
            f"data source {spec.get('path', '')!r}: {problem}. Its keys: {', '.join(SPEC_KEYS)}."
        )
    weight = _weight(entry.get("weight", 1.0), str(entry["path"]))
    check_reading(entry.get("format"), entry.get("limit"), rules.on_bad_record)
    template = ChatTemplate.of(tokenizer) if template is None else template
    how = Rendering(
        tokenizer,
        template,
        rules,
        eos_ids,
        entry.get("written_by"),
        routes,
        entry.get("format"),
        None if vision is None else Sight(vision, _image_rules(entry)),
    )
    return entry, weight, how


def _image_rules(entry: Mapping[str, Any]) -> ImageRules:
    """Where the images of a source may lie: its own image_folder, else where its file is."""
    place = Path(str(entry["path"])).expanduser()
    folder = place if place.is_dir() else place.parent
    if "image_folder" in entry:
        folder = Path(entry["image_folder"]).expanduser()
    if "image_folder" in entry and not folder.is_dir():
        raise ConfigError(
            f"data source {place}: image_folder {str(folder)!r} is no folder. Name the images' folder."
        )
    return ImageRules(folder, bool(entry.get("image_urls", False)), entry.get("max_pixels"))


def _place(entry: Mapping[str, Any]) -> Place:
    options = entry.get("storage_options", {})
    return Place(str(entry["path"]), entry.get("split"), entry.get("config"), entry.get("revision"), options)


def _name(entry: Mapping[str, Any]) -> str:
    """The name of a source; without one that of its file, of a pattern the first part from its end that is no star."""
    path = Path(str(entry["path"]))
    parts = (part.split(".")[0].replace("*", "").strip("-_") for part in (path.stem, *path.parts[-2::-1]))
    return str(entry.get("name") or next(filter(None, parts), "data"))


def _source(text: Text, how: Rendering, path: str, name: str, weight: float, stream: int) -> Source:
    """The source of a text in the cache. DataError where none of its records can be trained on."""
    found, counts = text.part.found, {"read": text.part.found.good, **text.part.counts}
    summary = found.summary(path, given=how.format is not None)
    counts["bad"] = found.bad + counts.get("bad", 0)
    cuts = [name for name in counts if name.startswith(("cut to ", "prompts cut to "))]
    dropped = {
        name: value
        for name, value in counts.items()
        if name not in ("read", "truncated", "bad", *cuts) and value
    }
    reasons = ", ".join(f"{value} {name}" for name, value in dropped.items())
    if not text.part.examples:
        bad = f"; {counts['bad']} bad, the first: {found.problems[0]}" if found.problems else ""
        raise DataError(
            f"{path}: none of {found.good} records can be trained on ({reasons or 'all bad'}{bad}).\n"
            f"Check the format ({FORMATS[found.format]}) and, for rows that are too long, max_length "
            f"{how.rules.max_length}."
        )
    counts["kept"] = text.part.examples
    summary += f"; {text.part.examples} kept" + (f", {reasons}" if reasons else "")
    if counts["truncated"]:
        summary += f", {counts['truncated']} truncated" + "".join(
            f", {counts[name]} {name}" for name in cuts if counts[name]
        )
    text.table.stream = stream
    text.table.vision = None if how.sight is None else how.sight.vision
    examples = Examples([text.table])
    return Source(examples, name, weight, found.format, summary, counts, tuple(found.problems))


def _identity(data: Any) -> Any:
    """What changes when a data set at hand does: its fingerprint where it has one, else a hash of its records."""
    if hasattr(data, "_fingerprint") and hasattr(data, "with_format"):
        return {"fingerprint": data._fingerprint}
    digest = xxhash.xxh3_128()
    for record in data:
        digest.update(
            json.dumps(dict(record), sort_keys=True, default=_content).encode("utf-8", "surrogatepass")
        )
    return {"content": digest.hexdigest()}


def _content(value: Any) -> str:
    """What tells values apart that JSON does not know: of images and arrays their content."""
    if not hasattr(value, "tobytes"):
        return str(value)
    about = [getattr(value, name, None) for name in ("mode", "dtype", "shape", "size")]
    return f"{about} {xxhash.xxh3_128(value.tobytes()).hexdigest()}"


def _items(data: Any, name: str) -> Iterable[Item]:
    return ((f"{name}[{index}]", dict(record)) for index, record in enumerate(data))


def _weight(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(
            f"{path}: weight is {value!r}. What would work: a number above 0, for example 1 or 0.5."
        )
    return float(value)


def fingerprint_of(sources: Sequence[Source]) -> str:
    """A hash of the training text of several sources; 32 hexadecimal digits."""
    if not any(source.streamed for source in sources):
        return Examples.joined([source.examples for source in sources]).fingerprint
    return xxhash.xxh3_128("/".join(source.fingerprint for source in sources).encode()).hexdigest()


def batches(sources: Sequence[Source], options: BatchOptions, epoch: int) -> Epoch | StreamEpoch:
    """The batches of one epoch of several sources, each made when it is asked for."""
    sizes, weights = [len(source) for source in sources], [source.weight for source in sources]
    streamed = [source.streamed for source in sources if source.streamed is not None]
    if streamed:
        return StreamEpoch(streamed, weights, options, epoch)
    drawn = draw(sizes, weights, seed=options.seed, epoch=epoch)
    return Epoch(Examples.joined([source.examples for source in sources]), drawn, options, epoch)
