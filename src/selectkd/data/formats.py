"""Record formats: what a row of a data set can look like, and the one shape every row becomes, a ``Sample``.

Detection goes by field names only. A row with the fields of two formats, or of none, is refused rather than
guessed. This module imports no tensor library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from selectkd.data.turns import Where, check_order, from_json, plain_text, text_of, turn_of
from selectkd.errors import DataError

FORMATS: Mapping[str, str] = {
    "messages": "messages: [{role, content}, ...]; every assistant turn is trained",
    "conversations": "conversations: [{from, value}, ...] (ShareGPT); every gpt turn is trained",
    "prompt_completion": "prompt + completion (also query/question + response/answer), text or messages",
    "instruction": "instruction + output (or response), optional input, system and history",
    "preference": "prompt + chosen + rejected; chosen is trained, rejected is not used",
    "unpaired_preference": "prompt + completion, messages, ... + label; true is trained, false is left out",
    "text": "text: plain text, every token trained",
    "tokens": "input_ids, optional labels (-100 = not trained) or completion_mask",
}

PROMPT_NAMES = ("prompt", "query", "question")
COMPLETION_NAMES = ("completion", "response", "answer")
VERDICTS = ("label", "kto_tag")
"""Fields that say whether an answer is good: TRL's and LLaMA-Factory's."""
READ = {
    "prompt_completion": (*PROMPT_NAMES, *COMPLETION_NAMES, "system", "system_prompt", "tools"),
    "instruction": (
        "instruction", "input", "context", "output", *COMPLETION_NAMES, "system", "system_prompt", "history", "tools",
    ),
    "preference": (*PROMPT_NAMES, "chosen", "rejected", "system", "system_prompt", "tools"),
}  # fmt: skip
"""The fields of formats of several; of the others the text stands in the field that names them."""
ASIDE = ("context", "input", "passage", "document", "history", "instruction", "reasoning", "reasoning_content",
         "thinking", "system", "system_prompt", "tools")  # fmt: skip
"""Fields that are text of other formats, so that a reader may take them for text of this one."""
LABELLED = ("messages", "conversations", "prompt_completion", "instruction")
"""Formats whose rows may carry a verdict, ``label: true`` or ``false``."""


@dataclass(frozen=True)
class Sample:
    """One row in the common shape; exactly one of messages, completion, text and input_ids is set.

    ``trained`` holds the indices of the assistant turns that are learned. ``instruction`` is the row's own
    (instruction, input) pair, kept for tokenizers without a chat template. ``rejected``: its label says that it is no
    good answer.
    """

    origin: str
    format: str
    messages: tuple[dict[str, Any], ...] | None = None
    trained: tuple[int, ...] = ()
    tools: tuple[Any, ...] | None = None
    prompt: str = ""
    completion: str | None = None
    instruction: tuple[str, str] | None = None
    text: str | None = None
    input_ids: tuple[int, ...] | None = None
    mask: tuple[bool, ...] | None = None
    rejected: bool = False


def _present(record: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that the record has with a value, else None."""
    return next((name for name in names if record.get(name) is not None), None)


def matching_formats(record: Mapping[str, Any]) -> tuple[str, ...]:
    """Every format whose fields the record has; the prompt of a preference row counts for it alone."""
    rest = {name: value for name, value in record.items() if value is not None}
    found: list[str] = []
    if "chosen" in rest and "rejected" in rest:
        found.append("preference")
        prompt = _present(rest, (*PROMPT_NAMES, "conversations", "instruction", "messages"))
        for name in ("chosen", "rejected", prompt, "input" if prompt == "instruction" else None):
            rest.pop(name or "", None)
    found += [name for name in ("messages", "conversations") if name in rest]
    if "instruction" in rest and _present(rest, ("output", *COMPLETION_NAMES)):
        found.append("instruction")
    elif _present(rest, PROMPT_NAMES) and _present(rest, COMPLETION_NAMES):
        found.append("prompt_completion")
    if "input_ids" in rest:
        found.append("tokens")
    if "text" in rest:
        found.append("text")
    if len(found) == 1 and found[0] in LABELLED and isinstance(verdict_of(record), bool):
        return ("unpaired_preference",)
    return tuple(found)


def left_aside(record: Mapping[str, Any], format: str) -> list[str]:
    """Fields of a record that look like text and are no part of it in this format."""
    if format not in READ:
        return []
    read = (*READ[format], *(READ["instruction"] if record.get("instruction") else ()))
    return [name for name in ASIDE if record.get(name) not in (None, "", []) and name not in read]


def verdict_of(record: Mapping[str, Any]) -> Any:
    """The record's verdict on its answer, None where it has none."""
    name = _present(record, VERDICTS)
    return None if name is None else record[name]


def detect_format(record: Mapping[str, Any], *, origin: str = "record") -> str:
    """The name in FORMATS of the one format whose fields the record has.

    Raises DataError for a record with the fields of two formats or of none, naming the fields it has.
    """
    found = matching_formats(record)
    if len(found) == 1:
        return found[0]
    names = ", ".join(sorted(map(str, record))[:12]) or "none"
    if found:
        raise DataError(
            f"{origin}: the fields of {len(found)} formats at once ({', '.join(found)}); fields: {names}.\n"
            f"Say which one is meant with `format: {found[0]}` in the source, or remove the other fields."
        )
    raise DataError(
        f"{origin}: no known format; fields: {names}.\n"
        "What would work: messages | conversations | prompt + completion | instruction + output |\n"
        "prompt + chosen + rejected | text | input_ids."
    )


def to_sample(record: Mapping[str, Any], format: str, *, origin: str = "record") -> Sample:
    """The record as a ``Sample``; ``format`` is a key of FORMATS.

    Raises DataError naming ``origin`` and the field for a wrong role, role order or type, for text that is
    not valid Unicode, and for token ids that are not integers.
    """
    if format not in _READERS:
        raise DataError(f"{origin}: no format is called {format!r}. What would work: {', '.join(FORMATS)}.")
    return _READERS[format](record, Where(origin))


def _refuse(where: Where, problem: str) -> NoReturn:
    raise DataError(f"{where}: {problem}")


def _need(record: Mapping[str, Any], names: Sequence[str], where: Where) -> tuple[str, Any]:
    name = _present(record, names)
    if name is None:
        _refuse(where, f"the field {names[0]!r} is missing or null; it needs text.")
    return name, record[name]


def _turns(value: Any, where: Where) -> list[dict[str, Any]]:
    """A list of turns, or one turn alone, as messages in the role/content shape."""
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        items = from_json(value)
    if not isinstance(items, list | tuple) or not items:
        _refuse(where, f"needs a list of turns, not {_shown(value)}.")
    return [turn_of(item, where.at(index)) for index, item in enumerate(items)]


def _chat(
    origin: str,
    format: str,
    messages: list[dict[str, Any]],
    where: Where,
    *,
    record: Mapping[str, Any],
    first_trained: int = 0,
    instruction: tuple[str, str] | None = None,
    plain: tuple[str, str] | None = None,
) -> Sample:
    """A chat sample whose assistant turns from ``first_trained`` on are trained, blank ones and weight 0
    excepted.
    """
    check_order(messages, where)
    weights = [message.pop("weight", 1) for message in messages]
    trained = tuple(
        index
        for index, message in enumerate(messages)
        if index >= first_trained
        and message["role"] == "assistant"
        and weights[index] != 0
        and (text_of(message["content"]).strip() or message.get("tool_calls"))
    )
    return Sample(
        origin,
        format,
        messages=tuple(messages),
        trained=trained,
        tools=_tools(record.get("tools"), Where(origin).at("tools")),
        prompt=plain[0] if plain else "",
        completion=plain[1] if plain else None,
        instruction=instruction,
    )


def _tools(value: Any, where: Where) -> tuple[Any, ...] | None:
    """Tool schemas, given as a list or as JSON text of one; None when there are none."""
    if value is None or value == "" or value == []:
        return None
    given = value
    if isinstance(value, str):
        value = from_json(value)
        if value is None:
            _refuse(where, f"is text that is not JSON: {_shown(given)}.")
    if not isinstance(value, list | tuple):
        _refuse(where, f"needs a list of tool schemas, not {_shown(given)}.")
    for index, schema in enumerate(value):
        if not isinstance(schema, Mapping):
            _refuse(where.at(index), f"needs a tool schema, an object, not {_shown(schema)}.")
    return tuple(value) or None


def _system(record: Mapping[str, Any], where: Where) -> list[dict[str, Any]]:
    name = _present(record, ("system", "system_prompt"))
    text = plain_text(record[name], where.at(name)) if name else ""
    return [{"role": "system", "content": text}] if text else []


def _extra_input(record: Mapping[str, Any], where: Where) -> str:
    """The text of an instruction's ``input`` or ``context``, empty where there is none."""
    name = _present(record, ("input", "context"))
    return plain_text(record[name], where.at(name)) if name else ""


def _messages(record: Mapping[str, Any], where: Where) -> Sample:
    at = where.at("messages")
    turns = _turns(record.get("messages"), at)
    return _chat(where.origin, "messages", turns, at, record=record)


def _conversations(record: Mapping[str, Any], where: Where) -> Sample:
    at = where.at("conversations")
    turns = _turns(record.get("conversations"), at)
    if turns[0]["role"] != "system":
        turns = _system(record, where) + turns
    return _chat(where.origin, "conversations", turns, at, record=record)


def _pair(
    record: Mapping[str, Any], where: Where, prompt: tuple[str, Any], answer: tuple[str, Any], format: str
) -> Sample:
    """A prompt and the completion that is trained, each either text or turns."""
    prompt_at, answer_at = where.at(prompt[0]), where.at(answer[0])
    plain = None
    if isinstance(prompt[1], str):
        turns = [{"role": "user", "content": plain_text(prompt[1], prompt_at)}]
    else:
        turns = _turns(prompt[1], prompt_at)
    if isinstance(answer[1], str):
        reply = [{"role": "assistant", "content": plain_text(answer[1], answer_at)}]
    else:
        reply = _turns(answer[1], answer_at)
    if isinstance(prompt[1], str) and isinstance(answer[1], str):
        plain = (prompt[1], answer[1])
    if reply[: len(turns)] == turns:
        reply = reply[len(turns) :]
    if turns[0]["role"] != "system":
        turns = _system(record, where) + turns
    return _chat(
        where.origin, format, turns + reply, where, record=record, first_trained=len(turns), plain=plain
    )


def _prompt_completion(record: Mapping[str, Any], where: Where) -> Sample:
    prompt = _need(record, PROMPT_NAMES, where)
    return _pair(record, where, prompt, _need(record, COMPLETION_NAMES, where), "prompt_completion")


def _preference(record: Mapping[str, Any], where: Where) -> Sample:
    chosen = _need(record, ("chosen",), where)
    name = _present(record, (*PROMPT_NAMES, "conversations", "instruction", "messages"))
    if name is None:
        turns = chosen[1]
        if not isinstance(turns, list | tuple) or len(turns) < 2:
            _refuse(
                where,
                "chosen and rejected have no prompt. Add the field 'prompt', or put the turns in chosen.",
            )
        return _pair(record, where, ("chosen", list(turns[:-1])), ("chosen", [turns[-1]]), "preference")
    prompt = record[name]
    if name == "instruction":
        given = _extra_input(record, where)
        prompt = f"{plain_text(prompt, where.at(name))}\n\n{given}" if given else prompt
    return _pair(record, where, (name, prompt), chosen, "preference")


def _instruction(record: Mapping[str, Any], where: Where) -> Sample:
    instruction = plain_text(record.get("instruction"), where.at("instruction"))
    name, value = _need(record, ("output", *COMPLETION_NAMES), where)
    output = plain_text(value, where.at(name))
    extra = _extra_input(record, where)
    turns = _system(record, where)
    history = record.get("history")
    if not isinstance(history, list | tuple | None):
        _refuse(where.at("history"), f"needs a list of [instruction, response], not {_shown(history)}.")
    for index, past in enumerate(history or ()):
        at = where.at("history").at(index)
        if not isinstance(past, list | tuple) or len(past) != 2:
            _refuse(at, f"needs [instruction, response], not {_shown(past)}.")
        turns.append({"role": "user", "content": plain_text(past[0], at)})
        turns.append({"role": "assistant", "content": plain_text(past[1], at)})
    plain = None if turns else (instruction, output)
    request = f"{instruction}\n\n{extra}" if extra else instruction
    turns += [{"role": "user", "content": request}, {"role": "assistant", "content": output}]
    return _chat(
        where.origin,
        "instruction",
        turns,
        where,
        record=record,
        first_trained=len(turns) - 1,
        instruction=(instruction, extra),
        plain=plain,
    )


def _text(record: Mapping[str, Any], where: Where) -> Sample:
    return Sample(where.origin, "text", text=plain_text(record.get("text"), where.at("text")))


def _tokens(record: Mapping[str, Any], where: Where) -> Sample:
    ids = _integers(record.get("input_ids"), where.at("input_ids"))
    labels, mask = record.get("labels"), record.get("completion_mask")
    trained = [True] * len(ids)
    if labels is not None:
        at = where.at("labels")
        values = _integers(labels, at, of=len(ids))
        for index, (token, label) in enumerate(zip(ids, values, strict=True)):
            if label not in (-100, token):
                _refuse(
                    at.at(index),
                    f"is {label}, but input_ids[{index}] is {token}: labels must not be shifted.",
                )
        trained = [label != -100 for label in values]
    if mask is not None:
        values = _integers(mask, where.at("completion_mask"), of=len(ids), masks=True)
        trained = [bool(value) and kept for value, kept in zip(values, trained, strict=True)]
    given = record.get("attention_mask")
    given = [1] * len(ids) if given is None else given
    present = _integers(given, where.at("attention_mask"), of=len(ids), masks=True)
    kept = [index for index, value in enumerate(present) if value]
    return Sample(
        where.origin, "tokens", input_ids=tuple(ids[i] for i in kept), mask=tuple(trained[i] for i in kept)
    )


def _integers(value: Any, where: Where, *, of: int | None = None, masks: bool = False) -> list[int]:
    """A list of integers, of the length of input_ids when ``of`` is given; ``masks`` holds 0, 1 or booleans."""
    if not isinstance(value, list | tuple):
        _refuse(where, f"needs a list of integers, not {_shown(value)}.")
    for index, item in enumerate(value):
        if not isinstance(item, int) or (isinstance(item, bool) and not masks):
            _refuse(where.at(index), f"needs an integer, not {_shown(item)}.")
        if masks and item not in (0, 1):
            _refuse(where.at(index), f"is {item}; a mask holds 0 and 1.")
    if of is not None and len(value) != of:
        _refuse(where, f"has {len(value)} entries, but input_ids has {of}.")
    return [int(item) for item in value]


def _unpaired(record: Mapping[str, Any], where: Where) -> Sample:
    """A row of one answer with a verdict on it."""
    label = verdict_of(record)
    if not isinstance(label, bool):
        _refuse(where.at(_present(record, VERDICTS) or "label"), f"needs true or false, not {_shown(label)}.")
    kinds = matching_formats({name: value for name, value in record.items() if name not in VERDICTS})
    if len(kinds) != 1 or kinds[0] not in LABELLED:
        _refuse(where, f"a row with a label needs the fields of one of {', '.join(LABELLED)}.")
    return replace(_READERS[kinds[0]](record, where), format="unpaired_preference", rejected=not label)


def _shown(value: Any) -> str:
    """A short form of a value for an error message."""
    text = repr(value)
    return f"{type(value).__name__} {text[:60]}{'...' if len(text) > 60 else ''}"


_READERS = {
    "messages": _messages,
    "conversations": _conversations,
    "prompt_completion": _prompt_completion,
    "instruction": _instruction,
    "preference": _preference,
    "unpaired_preference": _unpaired,
    "text": _text,
    "tokens": _tokens,
}
