"""Which format a record has, by the names of its fields alone.

A record may have the fields of several formats. The first one of FORMATS counts: what is closest to tokens, then what
says most about the turns. Fields of the others are no part of the text, and ``left_aside`` names them. This module
imports no tensor library.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selectkd.data.image_parts import MEDIA, columns_of, filled
from selectkd.data.turns import pair_of, role_of
from selectkd.data.unread import unread_images
from selectkd.errors import DataError

FORMATS: Mapping[str, str] = {
    "tokens": "input_ids, optional labels (-100 = not trained) or a mask such as completion_mask or assistant_masks",
    "preference": "prompt + chosen + rejected; chosen is trained, rejected is not used",
    "unpaired_preference": "prompt + completion, messages, ... + label; true is trained, false is left out",
    "messages": "messages: [{role, content}, ...]; every assistant turn is trained",
    "conversations": "conversations: [{from, value}, ...] (ShareGPT); every gpt turn is trained",
    "instruction": "instruction + output (or response), optional input, system and history",
    "prompt_completion": "prompt + completion (also question + answer, problem + solution, ...), text or messages",
    "text": "text (or content): plain text, every token trained",
}
"""The formats in the order in which one is chosen for a record with the fields of several."""

PROMPT_NAMES = ("prompt", "query", "question", "problem", "inputs")
COMPLETION_NAMES = ("completion", "response", "solution", "generated_solution", "answer", "targets", "target")
"""A solution comes before an answer, which is its last line where a record has both (MATH-500, NuminaMath)."""
CALLS = "answers"
"""The field of the calls that answer a prompt in a record with tools (xLAM)."""
OUTPUT_NAMES = ("output", *COMPLETION_NAMES, "generation")
TALK_NAMES = ("conversations", "conversation")
PAIRS = "texts"
"""The field of a conversation of {user, assistant} objects (the Cauldron, FineVision)."""
TEXT_NAMES = ("text", "content")
SYSTEM_NAMES = ("system", "system_prompt")
VERDICTS = ("label", "kto_tag", "desirable")
"""Fields that say whether an answer is good: TRL's, LLaMA-Factory's and one of many data sets."""
LABELLED = ("messages", "conversations", "prompt_completion", "instruction")
"""Formats whose rows may have a verdict. A row with ``label: false`` is never trained, whoever names its format."""

_OTHERS = ("tools", "functions", *SYSTEM_NAMES)
_PAIR = (*PROMPT_NAMES, "input", *COMPLETION_NAMES, CALLS, "output", *_OTHERS)
_INSTRUCTION = ("instruction", "input", "context", *OUTPUT_NAMES, "history", *_OTHERS)
READ: Mapping[str, Collection[str]] = {
    "tokens": ("input_ids",),
    "preference": (
        *PROMPT_NAMES, "conversations", "messages", "instruction", "input", "context", "chosen", "rejected", *_OTHERS,
    ),
    "unpaired_preference": ("messages", *TALK_NAMES, *_PAIR, *_INSTRUCTION),
    "messages": ("messages", *_OTHERS),
    "conversations": (*TALK_NAMES, PAIRS, *_OTHERS),
    "instruction": _INSTRUCTION,
    "prompt_completion": _PAIR,
    "text": TEXT_NAMES,
}  # fmt: skip
"""The fields that may be the text of each format."""
SPOKEN = tuple(dict.fromkeys(
    name for names in (*READ.values(), ("passage", "document", "reasoning", "reasoning_content", "thinking"))
    for name in names
))  # fmt: skip
"""Fields that hold text in one format or another, so that a reader may take them for text of this one."""


def present(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that the record has with a value, else None."""
    return next((name for name in names if record.get(name) is not None), None)


def pair_names(record: Mapping[str, Any]) -> tuple[str, str] | None:
    """The fields of a prompt and its completion, None where the record has no such pair."""
    prompt, answer = present(record, PROMPT_NAMES), present(record, COMPLETION_NAMES)
    if prompt is not None and answer is not None:
        return prompt, answer
    if prompt is not None and record.get(CALLS) and record.get("tools"):
        return prompt, CALLS
    prompt, answer = present(record, ("input", *PROMPT_NAMES)), present(record, ("output", *COMPLETION_NAMES))
    return (prompt, answer) if prompt is not None and answer is not None else None


def talk_name(record: Mapping[str, Any]) -> str | None:
    """The field of a record's conversation, None where it has none."""
    pairs = record.get(PAIRS)
    first = pairs[0] if isinstance(pairs, list | tuple) and pairs else None
    found = present(record, TALK_NAMES)
    return PAIRS if found is None and isinstance(first, Mapping) and pair_of(first) else found


def matching_formats(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The format of a record, empty where its fields are those of none.

    >>> matching_formats({"instruction": "Add.", "output": "5", "text": "Add. 5"})
    ('instruction',)
    """
    if record.get("input_ids") is not None:
        return ("tokens",)
    if record.get("chosen") is not None and record.get("rejected") is not None:
        return ("preference",)
    found = None
    if record.get("messages") is not None:
        found = "messages"
    elif talk_name(record):
        found = "conversations"
    elif record.get("instruction") is not None and present(record, OUTPUT_NAMES):
        found = "instruction"
    elif pair_names(record):
        found = "prompt_completion"
    elif not _one_turn(record) and present(record, TEXT_NAMES):
        found = "text"
    if found in LABELLED and isinstance(verdict_of(record), bool):
        return ("unpaired_preference",)
    return () if found is None else (found,)


def left_aside(record: Mapping[str, Any], format: str) -> list[str]:
    """Fields of a record that look like text or hold an image, a video or a sound, and are no part of it."""
    read = READ.get(format, SPOKEN)
    if format == "prompt_completion":  # one pair of fields is read, whatever other pairs there are
        read = (*(pair_names(record) or ()), *_OTHERS)
    spoken = [
        name for name in SPOKEN if name in record and record[name] not in (None, "", []) and name not in read
    ]
    images, media = columns_of(record), [name for name in MEDIA if filled(record.get(name))]
    return [
        *spoken,
        *(name for name in VERDICTS if record.get(name) is not None and format != "unpaired_preference"),
        *(images if format in ("tokens", "text") else images[1:]),
        *unread_images(record, SPOKEN),
        *media,
    ]


def verdict_of(record: Mapping[str, Any]) -> Any:
    """The record's verdict on its answer, of several one that is true or false; None where it has none."""
    found = [record[name] for name in VERDICTS if record.get(name) is not None]
    return next((one for one in found if isinstance(one, bool)), found[0] if found else None)


def detect_format(record: Mapping[str, Any], *, origin: str = "record") -> str:
    """The name in FORMATS of a record's format. Raises DataError naming its fields where it is of none."""
    found = matching_formats(record)
    if found:
        return found[0]
    raise no_format(record, origin)


def no_format(record: Mapping[str, Any], origin: str) -> DataError:
    """The error of a record whose fields are those of no format: its fields, and what is missing beside them."""
    names = ", ".join(sorted(map(str, record))[:12]) or "none"
    return DataError(
        f"{origin}: no known format; fields: {names}.{_missing(record)}\n"
        "What would work: messages | conversations | prompt + completion | instruction + output |\n"
        "prompt + chosen + rejected | text | input_ids."
    )


def _missing(record: Mapping[str, Any]) -> str:
    if _one_turn(record) and present(record, TEXT_NAMES):
        return (
            f"\nThe row is one turn of a conversation, with the role {str(record['role'])[:40]!r}. Join the turns of "
            "each conversation into one row with `messages`; `format: text` trains each as text of its own."
        )
    wanted = {
        **dict.fromkeys(("chosen",), ("rejected",)),
        **dict.fromkeys(("rejected",), ("chosen",)),
        **dict.fromkeys(("instruction",), OUTPUT_NAMES),
        **dict.fromkeys((*PROMPT_NAMES, "input"), COMPLETION_NAMES),
        **dict.fromkeys(COMPLETION_NAMES, PROMPT_NAMES),
    }
    name = present(record, tuple(wanted))
    if name is None:
        empty = [each for each in SPOKEN if each in record and record[each] is None]
        return f"\nOf these {', '.join(empty)} {'is' if len(empty) == 1 else 'are'} null." if empty else ""
    some = [each for each in wanted[name] if each in record] or wanted[name][:3]
    return f"\nThe row has {name!r}, and beside it {' or '.join(some)} is missing or null."


def _one_turn(record: Mapping[str, Any]) -> bool:
    """Whether a record is a turn of a conversation in a row of its own, such as a message of a tree (OASST)."""
    role = record.get("role")
    if record.get("text") is not None and not (isinstance(role, str) and "parent_id" in record):
        return role_of(role) is not None or role == "prompter"
    return role is not None
