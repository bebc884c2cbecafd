"""Where examples come from: a data set on disk or hub as a ``Source``, and seeded batches drawn from several
of them.

The order of an epoch is a function of (sources, seed, epoch, batch size) alone, so a run resumes by counting
batches.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from selectkd.data.collate import Batch, collate, collate_packed, pack
from selectkd.data.detection import FORMATS
from selectkd.data.files import OnBad, Records, read_records
from selectkd.data.formats import to_sample
from selectkd.data.render import Dropped, Example, TextRules, render
from selectkd.data.template import ChatTemplate
from selectkd.errors import ConfigError, DataError

SPEC_KEYS = ("path", "name", "format", "weight", "split", "limit", "config", "stream", "written_by")
WITHOUT_TOOLS = (
    "without their tool schemas, which the chat template leaves out (data.chat_template names another)"
)


@dataclass(frozen=True)
class Source:
    """Examples under a name. ``weight`` is how often an epoch has each: 1 once, 2 twice, 0.5 every other epoch.

    ``counts`` has the number of records read, kept, truncated, bad, and dropped for each reason; ``summary`` is one
    line on them.
    """

    examples: Sequence[Example]
    name: str = "data"
    weight: float = 1.0
    format: str = ""
    summary: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def fingerprint(self) -> str:
        """A hash of every token id and mask in order; 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for example in self.examples:
            digest.update(repr((example.input_ids, [int(c) for c in example.completion])).encode())
        return digest.hexdigest()


def dataset_source(
    spec: Mapping[str, Any],
    tokenizer: Any,
    rules: TextRules,
    *,
    on_bad_record: OnBad = "error",
    stream: int = 0,
    eos_ids: Collection[int] = (),
    template: ChatTemplate | None = None,
    route: Callable[[Mapping[str, Any], str], int] | None = None,
    records: Records | None = None,
) -> Source:
    """The Source a recipe's entry describes: {path, name, format, weight, split, limit, config, written_by}.

    eos_ids: what ends a turn beside the tokenizer's EOS and what the template writes. template: the tokenizer's, unless
    given. route: the teacher of a record, from its fields and its origin. records: in place of those at ``path``.
    Raises ConfigError for a key or weight that cannot be, DataError naming file:line for a record that cannot be
    trained on (kept in ``problems`` instead under ``on_bad_record="skip"``), and DataError when nothing is left.
    """
    given = {key: value for key, value in spec.items() if value is not None}
    unknown = sorted(set(given) - set(SPEC_KEYS))
    if unknown or "path" not in given:
        problem = f"unknown key {unknown[0]!r}" if unknown else "no path"
        raise ConfigError(f"data source {dict(spec)!r}: {problem}. Its keys: {', '.join(SPEC_KEYS)}.")
    weight = _weight(given.get("weight", 1.0), str(given["path"]))
    stream = int(given.get("stream", stream))
    if records is None:
        records = read_records(
            given["path"],
            split=given.get("split"),
            config=given.get("config"),
            format=given.get("format"),
            limit=given.get("limit"),
            on_bad_record=on_bad_record,
        )
    template = ChatTemplate.of(tokenizer) if template is None else template
    wanted, max_length = given.get("written_by"), rules.max_length
    counts: Counter[str] = Counter(read=len(records))
    problems = list(records.skipped)
    examples: list[Example] = []
    for origin, record in records:
        if wanted is not None and record.get("written_by") != wanted:
            counts["by another writer"] += 1
            continue
        try:
            sample = to_sample(record, records.format, origin=origin)
            found = render(sample, tokenizer, rules, stream=stream, eos_ids=eos_ids, template=template)
            teacher = -1 if route is None else route(record, origin)
        except DataError as error:
            if on_bad_record == "error":
                raise
            problems.append(str(error).splitlines()[0])
            continue
        for result in found:
            if isinstance(result, Dropped):
                counts[result.reason] += 1
                continue
            counts["truncated"] += result.truncated
            counts[f"prompts cut to max_prompt_length {rules.max_prompt_length}"] += result.cut_prompt
            counts[f"cut to max_length {max_length}"] += result.truncated and len(result) == max_length
            counts[WITHOUT_TOOLS] += result.without_tools
            examples.append(replace(result, route=teacher))
    cuts = ("read", "truncated", *(name for name in counts if " cut to " in f" {name}"))
    dropped = {name: value for name, value in counts.items() if name not in cuts and value}
    reasons = ", ".join(f"{value} {name}" for name, value in dropped.items())
    if not examples:
        bad = f"; {len(problems)} bad, the first: {problems[0]}" if problems else ""
        raise DataError(
            f"{given['path']}: none of {len(records)} records can be trained on "
            f"({reasons or 'all bad'}{bad}).\n"
            f"Check the format ({FORMATS[records.format]}) and max_length {max_length}."
        )
    counts.update(kept=len(examples), bad=len(problems))
    summary = f"{records.summary}; {len(examples)} kept" + (f", {reasons}" if reasons else "")
    if counts["truncated"]:
        summary += f", {counts['truncated']} truncated" + "".join(
            f", {counts[name]} {name}" for name in cuts[2:] if counts[name]
        )
    name = str(given.get("name") or Path(str(given["path"])).stem.split(".")[0] or "data")
    return Source(examples, name, weight, records.format, summary, dict(counts), tuple(problems))


def _weight(value: Any, path: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(
            f"{path}: weight is {value!r}. What would work: a number above 0, for example 1 or 0.5."
        )
    return float(value)


def draw(sources: Sequence[Source], *, seed: int, epoch: int) -> list[Example]:
    """The examples of one epoch in their seeded order.

    A source of weight w gives w * len(source) examples (rounded down over all epochs so far): it walks
    through one shuffle of itself after the other, so no example comes twice before every other has come once.
    """
    drawn: list[Example] = []
    for number, source in enumerate(sources):
        size = len(source)
        orders: dict[int, list[int]] = {}
        for position in range(int(epoch * source.weight * size), int((epoch + 1) * source.weight * size)):
            cycle, place = divmod(position, size)
            if cycle not in orders:
                orders[cycle] = list(range(size))
                random.Random(f"selectkd/source/{seed}/{number}/{cycle}").shuffle(orders[cycle])
            drawn.append(source[orders[cycle][place]])
    random.Random(f"selectkd/epoch/{seed}/{epoch}").shuffle(drawn)
    return drawn


def plan(
    sources: Sequence[Source],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    packing: bool = False,
    max_length: int | None = None,
    bucket: bool = False,
) -> list[list[list[Example]]]:
    """The batches of one epoch as lists of rows, a row being a list of examples (one, unless packed).

    ``bucket`` puts examples of like length together within windows of 50 batches; the order of batches stays
    random. The last batch may be short.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}. What would work: 1 or more.")
    examples = draw(sources, seed=seed, epoch=epoch)
    if not examples:
        raise DataError("This epoch has no examples. Raise the sources' weight, or add data.")
    shuffle = random.Random(f"selectkd/batches/{seed}/{epoch}").shuffle
    if packing:
        if max_length is None:
            raise ConfigError("packing needs max_length, the size of a bin in tokens.")
        rows = pack(examples, max_length)
        shuffle(rows)
    else:
        if bucket:
            window = 50 * batch_size
            examples = [
                example
                for start in range(0, len(examples), window)
                for example in sorted(examples[start : start + window], key=len)
            ]
        rows = [[example] for example in examples]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if bucket and not packing:
        shuffle(batches)
    return batches


def batches(
    sources: Sequence[Source],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    pad_id: int,
    packing: bool = False,
    max_length: int | None = None,
    bucket: bool = False,
    start: int = 0,
    pad_to_multiple_of: int = 8,
) -> Iterator[Batch]:
    """The batches of ``plan`` as tensors, from batch ``start`` on; no tensor is made for those before it."""
    rows = plan(
        sources,
        batch_size=batch_size,
        seed=seed,
        epoch=epoch,
        packing=packing,
        max_length=max_length,
        bucket=bucket,
    )
    for batch in rows[start:]:
        if packing:
            yield collate_packed(batch, pad_id=pad_id, pad_to_multiple_of=pad_to_multiple_of)
        else:
            yield collate([row[0] for row in batch], pad_id=pad_id, pad_to_multiple_of=pad_to_multiple_of)
