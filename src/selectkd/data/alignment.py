"""Whether teacher and student mean the same token by the same id: the proof a shared distribution needs.

Works on the tokenizers alone, before any weight is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from selectkd.data.render import eos_ids_of
from selectkd.errors import ConfigError

# Spaces, digits, accents in both Unicode forms, scripts, an emoji of several code points, code and line ends:
# where normalizers and pre-tokenizers of otherwise equal vocabularies part ways.
PROBES = (
    "The quick brown fox, 1234567890 and 3.14159!",
    "  two  spaces\tand a tab\r\nnew line\n\n",
    "caf\u00e9 cafe\u0301 na\u00efve \u00df \u0130",
    "def f(x):\n    return {'a': [x**2, None]}",
    "\u4f60\u597d\uff0c\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627",
    "\U0001f469\u200d\U0001f4bb don't WON'T it's",
)


@dataclass(frozen=True)
class Alignment:
    """Ids 0 .. shared_width - 1 mean the same to both; head rows from there on are padding. EOS ids may differ."""

    shared_width: int
    teacher_eos: tuple[int, ...]
    student_eos: tuple[int, ...]
    holes: tuple[int, ...] = ()

    def mask(self, width: int) -> Tensor:
        """Which of a head's ``width`` rows stand for a token of the shared vocabulary: bool [width]."""
        shared = torch.arange(width) < self.shared_width
        shared[[hole for hole in self.holes if hole < width]] = False
        return shared


def align(
    teacher_tokenizer: Any,
    student_tokenizer: Any,
    *,
    teacher_width: int | None = None,
    student_width: int | None = None,
    teacher_eos: Collection[int] = (),
    student_eos: Collection[int] = (),
) -> Alignment:
    """The alignment of two tokenizers whose ids agree; head widths (rows, padding included) may differ.

    Raises ConfigError naming the first ids that differ: another token at an id, a token only one side has,
    other merges, or another segmentation of probe texts; and when a head has fewer rows than the tokenizer
    has ids.
    """
    teacher_vocab, student_vocab = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if teacher_vocab != student_vocab:
        raise ConfigError(_vocabulary_difference(teacher_vocab, student_vocab))
    if not student_vocab:
        raise ConfigError("The tokenizers have no tokens. Give the tokenizer of a language model.")
    if teacher_tokenizer is not student_tokenizer:
        _same_model(teacher_tokenizer, student_tokenizer, student_vocab)
    used = set(student_vocab.values())
    width = max(used) + 1
    for side, rows in (("teacher", teacher_width), ("student", student_width)):
        if rows is not None and rows < width:
            raise ConfigError(
                f"The {side}'s head has {rows} rows, but its tokenizer has ids up to {width - 1}.\n"
                f"Use the tokenizer the {side} was trained with, or resize its embeddings to {width}."
            )
    return Alignment(
        shared_width=width,
        teacher_eos=tuple(sorted(eos_ids_of(teacher_tokenizer, teacher_eos))),
        student_eos=tuple(sorted(eos_ids_of(student_tokenizer, student_eos))),
        holes=tuple(sorted(set(range(width)) - used)),
    )


def _vocabulary_difference(teacher: dict[str, int], student: dict[str, int]) -> str:
    """The message for two vocabularies that differ: how much, and the first three ids where they do."""
    of_teacher = {index: token for token, index in teacher.items()}
    of_student = {index: token for token, index in student.items()}
    differ = sorted(
        index
        for index in of_teacher.keys() | of_student.keys()
        if of_teacher.get(index) != of_student.get(index)
    )
    if not differ:  # two tokens on one id
        differ = sorted({teacher.get(t, student.get(t, 0)) for t in teacher.keys() ^ student.keys()})
    lines = [
        f"  id {index}: teacher {_token(of_teacher, index)}, student {_token(of_student, index)}"
        for index in differ[:3]
    ]
    return (
        f"Teacher and student have different tokenizers: {len(differ)} ids differ "
        f"({len(teacher)} and {len(student)} tokens), the first:\n"
        + "\n".join(lines)
        + "\nWhat would work: a student with the teacher's tokenizer, for example of the same family, or "
        "teacher.cross_tokenizer: spans."
    )


def _token(tokens: dict[int, str], index: int) -> str:
    return repr(tokens[index])[:40] if index in tokens else "has no such id"


def _description(tokenizer: Any) -> dict[str, Any]:
    """The parts of a fast tokenizer that decide how text becomes ids; empty for one written in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {}
    parts = json.loads(backend.to_str())
    model = parts.get("model") or {}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or ()]
    return {
        "type": model.get("type"),
        "merges": merges,
        "normalizer": parts.get("normalizer"),
        "pre_tokenizer": parts.get("pre_tokenizer"),
    }


def _same_model(teacher: Any, student: Any, vocab: dict[str, int]) -> None:
    """Nothing when equal vocabularies also cut text alike; else ConfigError."""
    ours, theirs = _description(student), _description(teacher)
    if ours == theirs and ours:
        return
    advice = "What would work: a student with the teacher's own tokenizer."
    ours_merges, theirs_merges = ours.get("merges") or [], theirs.get("merges") or []
    if ours_merges != theirs_merges and ours and theirs:
        rank = next(
            (i for i, (a, b) in enumerate(zip(theirs_merges, ours_merges, strict=False)) if a != b),
            min(len(ours_merges), len(theirs_merges)),
        )
        shown = [_merge(merges, rank, vocab) for merges in (theirs_merges, ours_merges)]
        raise ConfigError(
            f"Teacher and student have the same tokens but other merges ({len(theirs_merges)} and "
            f"{len(ours_merges)}); the first, "
            f"number {rank}:\n  teacher {shown[0]}\n  student {shown[1]}\n{advice}"
        )
    for probe in PROBES:
        a, b = (list(t(probe, add_special_tokens=False)["input_ids"]) for t in (teacher, student))
        if a != b:
            at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            raise ConfigError(
                f"Teacher and student cut text differently: {probe[:24]!r} at token {at} is\n"
                f"  teacher ids {a[at : at + 4]}, student ids {b[at : at + 4]}.\n{advice}"
            )


def _merge(merges: list[str], rank: int, vocab: dict[str, int]) -> str:
    if rank >= len(merges):
        return "has none"
    left, _, right = merges[rank].partition(" ")
    return f"{left!r} + {right!r} (ids {vocab.get(left)}, {vocab.get(right)} -> {vocab.get(left + right)})"


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides which ids a text becomes; 32 hexadecimal digits. The template is not
    in it.
    """
    parts = {
        "vocab": sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0])),
        "eos": sorted(eos_ids_of(tokenizer)),
        "bos": getattr(tokenizer, "bos_token_id", None),
        **_description(tokenizer),
    }
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def template_fingerprint(tokenizer: Any) -> str:
    """A hash of the chat template, or the empty string without one."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return ""
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
