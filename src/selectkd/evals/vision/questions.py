"""Questions of benchmarks from local files: VLMEvalKit's tables with images in base64, or the hub's Parquet files.

One record is held at a time. The names of fields are those of either format; docs/vision_evaluation.md lists them.
"""

from __future__ import annotations

import re
import string
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectkd.data.chunks import of_file
from selectkd.data.images import ImageRules
from selectkd.data.images import found as found_image
from selectkd.data.places import Place, Rows
from selectkd.errors import DataError
from selectkd.evals.vision.values import literal_list

SMALL = 1 << 12
"""Bytes of a chunk, of which a table then has a row or two: images are large."""
REFERENCE = 64
"""An image cell of at most so many characters is the index of the row that has the image (VLMEvalKit's rule)."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""How a cell ends that is a path and no base64, which has no dots."""
FILLER = "nan"
"""What stands in empty cells of MMBench's Parquet files."""
TURN = 1_000_000
"""VLMEvalKit's index of a rotated question is the index of the question plus so many for each turn."""
INLINE_OPTIONS = re.compile(r"\s*\bOptions:\s*(?=A[:.]\s)", re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """What is asked of images, and what is right. images: encoded files; options: letter -> text, empty for an open
    question; answer: a letter, or the right text; groups: what the question is scored together with, by the name of
    the grouping; fields: the record's other fields. origin: file:line.
    """

    origin: str
    index: str
    text: str
    answer: str
    images: tuple[bytes, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_questions(
    path: Path, *, limit: int | None = None, circular: bool = False, split: str | None = None
) -> Iterator[Question]:
    """The questions of a file or folder in order, one at a time; at most ``limit``, a question with its turns one.

    circular: every question in each of its rotations, made here unless the file holds them. split: records that name
    another one are left out. A record without an image is left out, as VLMEvalKit does. DataError with file:line for a
    record that is no question, and where there is none at all.
    """
    (shared, turned), found = _scan(path), dict[str, None]()
    with tempfile.TemporaryDirectory(prefix="selectkd-images-") as folder:
        for number, (origin, record) in enumerate(_records(path)):
            if split is not None and record.get("split", split) != split:
                continue
            images = _images(record, origin, path, Path(folder))
            index = _index(record, number)
            if index in shared and images:
                (Path(folder) / _name(index)).write_bytes(images[0])
            group = str(int(index) % TURN) if turned and index.isdecimal() else index
            if not images or (len(found) == limit and group not in found):
                continue
            found[group] = None
            question = _question(record, origin, index, images)
            if circular and not question.options:
                raise DataError(f"{origin}: a question without options has no rotations.")
            yield from rotated(question) if circular and not turned else [question]
    if not found:
        raise DataError(
            f"{path}: no question with an image. Name a VLMEvalKit table or the hub's Parquet files."
        )


def rotated(question: Question) -> list[Question]:
    """The question once for each place of its options, each option moving on by one place at a time.

    Letters stay where they are; texts move. All turns are one group, ``rotations``. Source: Liu et al., MMBench (arXiv
    2307.06281), circular evaluation.
    """
    letters, texts = list(question.options), list(question.options.values())
    place, found = letters.index(question.answer), []
    for turn in range(len(letters)):
        moved = texts[turn:] + texts[:turn]
        found.append(
            Question(
                question.origin,
                f"{question.index}+{turn}",
                question.text,
                letters[(place - turn) % len(letters)],
                question.images,
                dict(zip(letters, moved, strict=True)),
                {**question.groups, "rotations": question.index},
                question.fields,
            )
        )
    return found


def _records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    found = Place(str(path)).open()
    if isinstance(found, Rows):
        raise DataError(f"{path}: a saved data set. Name the table or the Parquet files of the benchmark.")
    for file in found:
        for chunk in of_file(file, SMALL):
            for origin, record in chunk.items():
                if isinstance(record, DataError):
                    raise record
                yield origin, record


def _scan(path: Path) -> tuple[set[str], bool]:
    """(indices of rows whose image other rows have as well, whether the file holds rotations)."""
    shared, turned = set[str](), False
    for number, (_, record) in enumerate(_records(path)):
        cell, index = record.get("image"), _index(record, number)
        if isinstance(cell, str) and 0 < len(cell) <= REFERENCE:
            shared.add(cell)
        turned = turned or (index.isdecimal() and int(index) >= TURN)
    return shared, turned


def _index(record: Mapping[str, Any], number: int) -> str:
    return str(_first(record, "index", "id", "pid", "qid") or number)


def _images(record: Mapping[str, Any], origin: str, path: Path, spool: Path) -> tuple[bytes, ...]:
    """The encoded images of a record, in order."""
    numbered = [record.get(f"image_{number}") for number in range(1, 8)]
    single = _first(record, "decoded_image", "image", "images", "image_path")
    given = [one for one in numbered if one] or ([] if single in (None, "") else [single])
    if len(given) == 1 and isinstance(given[0], str) and given[0].startswith("["):
        given = list(literal_list(given[0]) or given)
    if len(given) == 1 and isinstance(given[0], list | tuple):
        given = list(given[0])
    folder = path if path.is_dir() else path.parent
    return tuple(image_bytes(one, origin, folder, spool) for one in given)


def image_bytes(source: Any, origin: str, folder: Path, spool: Path) -> bytes:
    """An encoded image of a cell: bytes, {bytes, path}, base64, a path inside ``folder``, or another row's index.

    The bytes are not decoded here. DataError with file:line for anything else (``data.images.found``).
    """
    if isinstance(source, str):
        kept = spool / _name(source)
        if kept.is_file():
            return kept.read_bytes()
        if len(source) <= REFERENCE and not Path(source).suffix:
            raise DataError(
                f"{origin}: the image is that of row {source!r}, and no row before has this index."
            )
        source = source if Path(source[-8:]).suffix.lower() in SUFFIXES else {"base64": source}
    return found_image(source, ImageRules(folder), origin).content()


def _question(record: Mapping[str, Any], origin: str, index: str, images: tuple[bytes, ...]) -> Question:
    text, answer = _first(record, "query", "question"), _first(record, "answer", "gt_answer")
    if not isinstance(text, str) or answer in (None, ""):
        raise DataError(f"{origin}: no question with its answer; fields: {', '.join(sorted(record))[:120]}.")
    text, options = _options(record, text, str(answer), origin)
    if isinstance(answer, list):
        answer = str(answer)
    right = _letter(record, str(answer), options, origin) if options else str(answer)
    kept = {key: one for key, one in record.items() if not key.startswith(("image", "decoded"))}
    if str(kept.get("hint")) == FILLER:
        del kept["hint"]
    return Question(origin, index, text, right, images, options, _groups(record, index), kept)


def _options(record: Mapping[str, Any], text: str, answer: str, origin: str) -> tuple[str, dict[str, str]]:
    """(the question without options, its options): of columns A, B, ..., a list, or the question itself (MMStar).

    Of columns behind the second, the last ones that hold ``FILLER`` are none, unless one is the answer.
    """
    columns = {one: str(record[one]) for one in string.ascii_uppercase if record.get(one) not in (None, "")}
    if columns:
        while len(columns) > 2 and columns[last := max(columns)] == FILLER and answer != last:
            del columns[last]
        return text, columns
    listed = _first(record, "options", "choices")
    texts = literal_list(listed) if isinstance(listed, str) else listed
    if texts:
        if len(texts) > 26:
            raise DataError(f"{origin}: {len(texts)} options; at most 26 have a letter.")
        return text, dict(zip(string.ascii_uppercase, map(str, texts), strict=False))
    inline = INLINE_OPTIONS.split(text, maxsplit=1)
    if len(inline) == 2:
        parts = re.split(r"(?:^|,\s*|\n\s*)([A-Z])[:.]\s", inline[1])
        options = {
            letter: one.strip().rstrip(",") for letter, one in zip(parts[1::2], parts[2::2], strict=True)
        }
        if list(options) == list(string.ascii_uppercase[: len(options)]):
            return inline[0], options
    return text, {}


def _letter(record: Mapping[str, Any], answer: str, options: Mapping[str, str], origin: str) -> str:
    """The letter of the right option, which a file gives as a letter, a text, or a place counted from 0.

    A number that is a place among ``options`` is one, whatever their texts (AI2D); among ``choices``, or columns, it is
    the text of an option first (MathVista).
    """
    stated = record.get("answer_option")
    if isinstance(stated, str) and stated in options:
        return stated
    if answer in options and len(answer) == 1:
        return answer
    place = int(answer) if answer.isdecimal() and int(answer) < len(options) else None
    if place is not None and record.get("A") in (None, "") and record.get("options") not in (None, ""):
        return list(options)[place]
    same = [letter for letter, text in options.items() if text.strip() == answer.strip()]
    if len(same) == 1:
        return same[0]
    if place is not None and not same:
        return list(options)[place]
    raise DataError(
        f"{origin}: the right answer {answer[:40]!r} is none of the options {', '.join(options)}."
    )


def _groups(record: Mapping[str, Any], index: str) -> dict[str, str]:
    """HallusionBench's figure and question, and the question of a rotated row, by VLMEvalKit's index or by columns."""
    groups = {}
    if index.isdecimal():
        groups["rotations"] = str(int(index) % TURN)
    parts = index.split("_")
    names = ("set_id", "figure_id", "question_id")
    if all(record.get(name) not in (None, "") for name in names):
        place = [str(record[name]) for name in names]
    elif len(parts) >= 6:
        place = parts[3:6]
    else:
        return groups
    kind = str(_first(record, "l2-category", "subcategory") or "")
    return {**groups, "figure": f"{kind}_{place[0]}_{place[1]}", "question": f"{kind}_{place[0]}_{place[2]}"}


def _first(record: Mapping[str, Any], *names: str) -> Any:
    return next((record[name] for name in names if record.get(name) not in (None, "")), None)


def _name(index: Sequence[str] | str) -> str:
    return "row-" + "".join(one if one.isalnum() else "-" for one in index)[:100]
