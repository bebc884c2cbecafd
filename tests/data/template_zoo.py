"""The zoo of chat templates: small ones in words of our own with the traps of 14 families, and what they train.

``zoo/NAME.jinja`` is a template, ``zoo/NAME.txt`` its special tokens and, for each conversation, the texts written by
hand. A line break of the text is ¶, those of the file mean nothing; what is trained stands between ⟦ and ⟧; ``--``
parts the texts of one conversation; ``!!`` is the message of a refusal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).with_name("zoo")
FAMILIES = sorted(path.stem for path in FOLDER.glob("*.jinja"))
MOMENT = "2026-01-02T03:04:05"
LONG = "and so on " * 40
"""An answer longer than ``MOST``."""
MOST = 320
TOOL = {"type": "function", "function": {"name": "weather", "description": "tells the weather"}}
TOOL_TEXT = '{"type": "function", "function": {"name": "weather", "description": "tells the weather"}}'
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


OSLO = turns(("user", "Where is Oslo?"), ("assistant", "In Norway."))
ROME = turns(("user", "And Rome?"), ("assistant", "In Italy."))
SYSTEM = turns(("system", "Be brief."))
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": OSLO},
    "tools": {
        "tools": [TOOL],
        "messages": [
            *turns(("user", "Weather in Oslo?")),
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "name": "weather", "tool_call_id": "call00001", "content": "7"},
            *turns(("assistant", "7 degrees.")),
        ],
    },
    "two questions": {"messages": [*SYSTEM, OSLO[0], *turns(("user", "Which country?")), OSLO[1]]},
    "empty turn": {"messages": [OSLO[0], *turns(("assistant", ""), ("user", "Once more?")), OSLO[1]]},
    "reasoning": {
        "messages": [
            OSLO[0], {**OSLO[1], "reasoning_content": "Oslo is a capital."},
            ROME[0], {**ROME[1], "reasoning_content": "Rome is one too."},
        ],
    },
    "multi-turn": {"messages": [*SYSTEM, *OSLO, *ROME]},
    "ends with user": {"messages": [*OSLO, ROME[0]]},
    "long": {"messages": [OSLO[0], {**OSLO[1], "content": LONG.strip()}]},
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """A template of the zoo. golden: by conversation the texts as (piece, trained) in order, or a refusal's message."""

    template: str
    roles: dict[str, str]
    special: tuple[str, ...]
    added: tuple[str, ...]
    golden: dict[str, str | list[list[tuple[str, bool]]]]


@lru_cache
def family(name: str) -> Family:
    head, *sections = re.split(r"^== (.*)\n", (FOLDER / f"{name}.txt").read_text("utf-8"), flags=re.MULTILINE)
    facts = dict(line.split(": ", 1) for line in head.splitlines())
    golden: dict[str, Any] = {}
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        golden[title] = (
            body[3:].strip() if body.startswith("!! ") else [_pieces(t) for t in body.split("\n--\n")]
        )
    roles = {f"{role}_token": facts[role] for role in ("bos", "eos") if role in facts}
    template = (FOLDER / f"{name}.jinja").read_text("utf-8")
    return Family(
        template, roles, tuple(facts["special"].split()), tuple(facts.get("added", "").split()), golden
    )


def _pieces(written: str) -> list[tuple[str, bool]]:
    text = (
        written.replace("\n", "")
        .replace("¶", "\n")
        .replace("@TOOL@", TOOL_TEXT)
        .replace("@LONG@", LONG.strip())
    )
    return [(piece, place % 2 == 1) for place, piece in enumerate(re.split("[⟦⟧]", text)) if piece]


@lru_cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes with the special tokens of a family, and its template."""
    one = family(name)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(one.special))
    tokenizer.add_tokens(list(one.added))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **one.roles)
    fast.chat_template = one.template
    return fast


def ids_of(pieces: list[tuple[str, bool]], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """The tokens of hand-written pieces, one piece after the other, and which are trained."""
    ids: list[int] = []
    trained: list[bool] = []
    for piece, kept in pieces:
        some = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += some
        trained += [kept] * len(some)
    return ids, trained
