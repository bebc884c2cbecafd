"""The bytes that each token of a vocabulary stands for, by which two tokenizers are compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from selectkd.data.alignment import PROBES
from selectkd.errors import ConfigError

SPACE = "\u2581"
"""SentencePiece's mark of a space."""


def token_bytes(tokenizer: Any) -> dict[int, bytes | None]:
    """The bytes of every id; None for a special token, which stands for no text.

    Knows byte-level BPE and SentencePiece-style vocabularies with or without byte fallback, and checks the result: the
    bytes of probe texts' tokens, joined, must be the texts. Raises ConfigError where they are not, or where the kind is
    another.
    """
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    literal = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    spelled = _spelling(tokenizer)
    table: dict[int, bytes | None] = {}
    for token, index in tokenizer.get_vocab().items():
        table[index] = (
            None if index in special else literal[index].encode() if index in literal else spelled(token)
        )
    _check(tokenizer, table)
    return table


def first_with(table: Mapping[int, bytes | None]) -> dict[bytes, int]:
    """The id of each byte string; where several ids share one, the last: byte-fallback tokens come first."""
    return {value: index for index, value in sorted(table.items()) if value}


def _spelling(tokenizer: Any) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    kinds = (
        json.dumps(json.loads(backend.to_str()).get("decoder"), ensure_ascii=False)
        if backend is not None
        else ""
    )
    if '"ByteLevel"' in kinds:
        letters = _letters()

        def of_letters(token: str) -> bytes | None:
            return bytes(letters[letter] for letter in token) if all(x in letters for x in token) else None

        return of_letters
    if any(kind in kinds for kind in ('"ByteFallback"', '"Metaspace"', SPACE)):
        return _of_pieces
    raise ConfigError(
        f"the tokens of {_named(tokenizer)} have no known bytes: its decoder is neither byte-level nor SentencePiece. "
        "Across tokenizers, use a teacher and a student whose tokenizers are (Llama, Qwen, Gemma, Mistral, SmolLM)."
    )


def _of_pieces(token: str) -> bytes | None:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(SPACE, " ").encode()


def _letters() -> dict[str, int]:
    """The byte of each letter of a byte-level vocabulary: printable ones stand for themselves, the others for the
    letters from U+0100 on, in order. Source: GPT-2's encoder.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _check(tokenizer: Any, table: Mapping[int, bytes | None]) -> None:
    for probe in PROBES:
        ids = list(tokenizer(probe, add_special_tokens=False)["input_ids"])
        joined = b"".join(table.get(index) or b"" for index in ids)
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).encode()
        if joined not in (text, b" " + text):
            raise ConfigError(
                f"the tokens of {_named(tokenizer)} do not join to its text: {joined[:40]!r} for {text[:40]!r}. "
                "Across tokenizers, use one that keeps every byte."
            )


def _named(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
