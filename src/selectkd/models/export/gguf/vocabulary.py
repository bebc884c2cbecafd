"""A tokenizer as a GGUF file holds it: tokens, their types, merges or scores, the way text is cut, and special ids.

Two kinds are written: byte-level BPE (llama.cpp's ``gpt2``) and SentencePiece's BPE with byte fallback (``llama``).
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from selectkd.errors import ConfigError

SPACE = "\u2581"
"""How SentencePiece writes a space."""
UNREACHED = -1e6
"""The score of a token that no merge makes."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {
    _WORDS + r"|\p{N}" + _REST: "qwen2",
    _WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
    + r"|\p{N}"
    + _REST.replace(r"\p{L}", r"\p{L}\p{M}"): "qwen35",
    _WORDS + r"|\p{N}{1,3}" + _REST: "dbrx",
    _CASED: "gpt-4o",
}
"""The regular expressions by which tokenizers cut text before any merge, and llama.cpp's name for each."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    model: gpt2 or llama. pre: how text is cut. special: ids by llama.cpp's names (bos, eos, eot, eom, unknown,
    padding). template: the Jinja chat template. notes: what llama.cpp does otherwise, in words.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None
    scores: list[float] | None
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool
    template: str | None
    notes: list[str] = field(default_factory=list)


def vocabulary_of(tokenizer: Any, width: int, ends: Collection[int]) -> Vocabulary:
    """The vocabulary of a fast tokenizer for a head of ``width`` rows. ``ends``: the ids that end a text.

    ConfigError for a kind of tokenizer, a cut of text, a flag of a token or a set of ends that GGUF has no place for.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(f"{type(tokenizer).__name__} is no fast tokenizer. Save its tokenizer.json first.")
    parts = json.loads(backend.to_str())
    model = parts["model"]
    if model["type"] != "BPE":
        raise ConfigError(
            f"GGUF files are written for BPE tokenizers alone, and this one is {model['type']}. Use --to merged."
        )
    byte_level = not model.get("byte_fallback")
    pre, notes = _cut_of(parts) if byte_level else ("default", [])
    tokens, types = _tokens(tokenizer, parts, width, byte_level)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    if not merges:
        raise ConfigError("GGUF has no place for a BPE tokenizer without merges. Export with --to merged.")
    special, more = _special(tokenizer, ends)
    empty = list(tokenizer("")["input_ids"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template, notes = (
            template.get("default"),
            [*notes, "of several chat templates the default one is kept"],
        )
    return Vocabulary(
        model="gpt2" if byte_level else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(_without_spaces(part) for part in pair) for pair in merges] if byte_level else None,
        scores=None if byte_level else _scores(model["vocab"], merges, width),
        special=special,
        add_bos=tokenizer.bos_token_id is not None and empty[:1] == [tokenizer.bos_token_id],
        add_eos=tokenizer.eos_token_id is not None and empty[-1:] == [tokenizer.eos_token_id],
        add_space_prefix=not byte_level and _prefixes(parts),
        template=template,
        notes=[*notes, *more],
    )


def _cut_of(parts: dict[str, Any]) -> tuple[str, list[str]]:
    """(llama.cpp's name for how a byte-level tokenizer cuts text, what llama.cpp leaves out)."""
    notes = []
    if parts.get("normalizer"):
        kinds = [one["type"] for one in _steps(parts["normalizer"], "normalizers")]
        if kinds != ["NFC"]:
            raise ConfigError(
                f"llama.cpp has no place for the normalizer {', '.join(kinds)}. Use --to merged."
            )
        notes.append("llama.cpp leaves out the tokenizer's NFC: compose text before it, or ids differ")
    steps = _steps(parts.get("pre_tokenizer") or {"type": "none"}, "pretokenizers")
    ignore_merges = bool(parts["model"].get("ignore_merges"))
    last = steps[-1]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise _unknown_cut(steps)
    kinds = [one["type"] for one in steps[:-1]]
    if last["use_regex"] and not kinds:
        return "gpt-2", notes
    if last["use_regex"] and kinds == ["Digits"] and steps[0]["individual_digits"]:
        return "smollm", notes
    if not last["use_regex"] and kinds == ["Split"] and steps[0]["behavior"] == "Isolated":
        name = SPLITS.get(steps[0]["pattern"].get("Regex", ""))
        if name == "dbrx" and ignore_merges:
            return "llama-bpe", notes
        if name is not None and not ignore_merges:
            return name, notes
    raise _unknown_cut(steps)


def _steps(part: dict[str, Any], inside: str) -> list[dict[str, Any]]:
    return part[inside] if part["type"] == "Sequence" else [part]


def _unknown_cut(steps: list[dict[str, Any]]) -> ConfigError:
    shown = json.dumps(steps, ensure_ascii=False)[:160]
    return ConfigError(
        f"llama.cpp's name for this way to cut text is not known here: {shown}. Use --to merged, and llama.cpp's "
        "convert_hf_to_gguf.py."
    )


def _tokens(
    tokenizer: Any, parts: dict[str, Any], width: int, byte_level: bool
) -> tuple[list[str], list[int]]:
    """The text and the type of each id of a head; rows without a token are unused."""
    tokens = [f"[PAD{i}]" for i in range(width)]
    types = [int(TokenType.UNUSED)] * width
    unknown = parts["model"].get("unk_token")
    for token, i in tokenizer.get_vocab().items():
        if i >= width:
            raise ConfigError(
                f"the token {token!r} has id {i}, and the head has {width} rows. Resize the model."
            )
        tokens[i], types[i] = token, int(TokenType.NORMAL)
        if not byte_level and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = int(TokenType.BYTE)
    for i, added in tokenizer.added_tokens_decoder.items():
        if added.single_word or (added.lstrip and added.content.strip()):
            raise ConfigError(
                f"llama.cpp has no place for the flags single_word or lstrip of the token {added.content!r}. "
                "Use --to merged."
            )
        types[i] = int(TokenType.CONTROL if added.special else TokenType.USER_DEFINED)
        if not byte_level and not added.special:
            tokens[i] = added.content.replace(SPACE, " ")  # such a token is found in the text as it is
        if not byte_level and added.content == unknown:
            types[i] = int(TokenType.UNKNOWN)
    return tokens, types


def _scores(vocab: dict[str, int], merges: list[list[str]], width: int) -> list[float]:
    """SentencePiece's scores: a token that is made earlier has the higher one.

    llama.cpp takes the neighbours whose token has the highest score, tokenizers the pair of the lowest rank; so the
    score of a token is minus the first rank that makes it.
    """
    scores = [UNREACHED] * width
    for rank, (left, right) in enumerate(merges):
        i = vocab.get(left + right)
        if i is not None and scores[i] == UNREACHED:
            scores[i] = -float(rank)
    return scores


def _special(tokenizer: Any, ends: Collection[int]) -> tuple[dict[str, int], list[str]]:
    """(ids by llama.cpp's names, notes); ConfigError where a text may end in more ways than a file can say."""
    eos = tokenizer.eos_token_id
    found = {
        "bos": tokenizer.bos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    special = {name: i for name, i in found.items() if i is not None}
    if not ends:
        return special, ["the student has no token that ends a text"]
    first = eos if eos in ends else min(ends)
    others = sorted(set(ends) - {first})
    if len(others) > 2:
        raise ConfigError(
            f"{len(ends)} tokens end a text ({', '.join(map(str, sorted(ends)))}), and a GGUF file can name three. "
            "Shorten eos_token_id in generation_config.json."
        )
    return special | dict(zip(("eos", "eot", "eom"), [first, *others], strict=False)), []


def _prefixes(parts: dict[str, Any]) -> bool:
    """Whether a SentencePiece tokenizer puts a space before a text."""
    normalizers = _steps(parts.get("normalizer") or {"type": "none"}, "normalizers")
    pre = _steps(parts.get("pre_tokenizer") or {"type": "none"}, "pretokenizers")
    prepended = any(one["type"] == "Prepend" for one in normalizers)
    return prepended or any(one.get("prepend_scheme") in ("first", "always") for one in pre)


def _without_spaces(part: str) -> str:
    """A merge is two words with a space between; a space within one is moved out of the way, as llama.cpp does."""
    return "".join(chr(ord(letter) + 256) if letter == " " else letter for letter in part)
