"""Records of every format as one shape, ``Sample``. This module imports no tensor library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from selectkd.data.detection import (
    CALLS,
    COMPLETION_NAMES,
    FORMATS,
    LABELLED,
    OUTPUT_NAMES,
    PROMPT_NAMES,
    SPOKEN,
    SYSTEM_NAMES,
    TALK_NAMES,
    TEXT_NAMES,
    VERDICTS,
    matching_formats,
    pair_names,
    present,
    talk_name,
    verdict_of,
)
from selectkd.data.fields import Where, from_json, plain_text, refuse, shown
from selectkd.data.image_parts import COLUMNS, PLACEHOLDER, ImagePart, check_media, columns_of, placed
from selectkd.data.pairs import RULES, joined
from selectkd.data.token_rows import token_row
from selectkd.data.turns import check_order, talk_of, text_of, transcript
from selectkd.data.unread import unread_images
from selectkd.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One row in the common shape; exactly one of messages, completion, text and input_ids is set.

    ``trained`` holds the indices of the assistant turns that are learned. ``instruction`` is the row's own
    (instruction, input) pair, kept for tokenizers without a chat template. ``rejected``: its label says that it is no
    good answer. images: those of the messages' image parts, in order; unread: where there are none,
    fields that hold some all the same.
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
    images: tuple[ImagePart, ...] = ()
    unread: tuple[str, ...] = ()


def to_sample(record: Mapping[str, Any], format: str, *, origin: str = "record") -> Sample:
    """The record as a ``Sample``; ``format`` is a key of FORMATS.

    Raises DataError naming ``origin`` and the field for a wrong role, role order or type, for text that is
    not valid Unicode, for token ids that are not integers, and for images whose placeholders are more or fewer.
    """
    if format not in _READERS:
        raise DataError(f"{origin}: no format is called {format!r}. What would work: {', '.join(FORMATS)}.")
    sample = _READERS[format](record, Where(origin))
    if format in LABELLED and verdict_of(record) is False:
        sample = replace(sample, rejected=True)
    if sample.messages is not None:
        check_media(record, origin)
        messages, images = placed(sample.messages, record, origin)
        if images:
            return replace(sample, messages=messages, images=images)
        unread = unread_images(record, SPOKEN, messages)
        return replace(sample, unread=unread) if unread else sample
    names = columns_of(record)
    held = [*names, *unread_images(record, SPOKEN)]
    if set(names) & set(COLUMNS[:2]) or (held and PLACEHOLDER in (sample.text or "")):
        raise DataError(
            f"{origin}: images beside {format}. What would work: messages, conversations, prompt + completion, or "
            "instruction + output."
        )
    return sample


def _need(record: Mapping[str, Any], names: Sequence[str], where: Where) -> tuple[str, Any]:
    name = present(record, names)
    if name is None:
        refuse(where, f"the field {names[0]!r} is missing or null; it needs text.")
    return name, record[name]


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
        tools=_tools_of(record, Where(origin)),
        prompt=plain[0] if plain else "",
        completion=plain[1] if plain else None,
        instruction=instruction,
    )


def _tools_of(record: Mapping[str, Any], where: Where) -> tuple[Any, ...] | None:
    """The record's tools; of OpenAI's older ``functions`` each becomes a tool."""
    tools = _tools(record.get("tools"), where.at("tools"))
    older = _tools(record.get("functions"), where.at("functions"))
    return tools or (older and tuple({"type": "function", "function": schema} for schema in older))


def _tools(value: Any, where: Where) -> tuple[Any, ...] | None:
    """Tool schemas, given as a list or as JSON text of one; None when there are none."""
    if value is None or value == "" or value == []:
        return None
    given = value
    if isinstance(value, str):
        value = from_json(value)
        if value is None:
            refuse(where, f"is text that is not JSON: {shown(given)}.")
    if not isinstance(value, list | tuple):
        refuse(where, f"needs a list of tool schemas, not {shown(given)}.")
    for index, schema in enumerate(value):
        if not isinstance(schema, Mapping):
            refuse(where.at(index), f"needs a tool schema, an object, not {shown(schema)}.")
    return tuple(value) or None


def _system(
    record: Mapping[str, Any], where: Where, turns: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, Any]]:
    """The system turn of a record's field, none before turns that begin with one of their own."""
    name = present(record, SYSTEM_NAMES)
    if name is None or (turns and turns[0]["role"] in RULES):
        return []
    text = plain_text(record[name], where.at(name))
    return [{"role": "system", "content": text}] if text else []


def _extra_input(record: Mapping[str, Any], where: Where) -> str:
    """The text of an instruction's ``input`` or ``context``, empty where there is none."""
    name = present(record, ("input", "context"))
    return plain_text(record[name], where.at(name)) if name else ""


def _messages(record: Mapping[str, Any], where: Where) -> Sample:
    at = where.at("messages")
    turns = talk_of(record.get("messages"), at)
    return _chat(where.origin, "messages", _system(record, where, turns) + turns, at, record=record)


def _conversations(record: Mapping[str, Any], where: Where) -> Sample:
    name = talk_name(record) or TALK_NAMES[0]
    at = where.at(name)
    turns = talk_of(record.get(name), at)
    start = 1 if turns[0]["role"] in RULES else 0
    while len(turns) > start and turns[start]["role"] == "assistant":
        del turns[start]  # an answer to a question that was left out of the record (ShareGPT)
    return _chat(where.origin, "conversations", _system(record, where, turns) + turns, at, record=record)


def _pair(
    record: Mapping[str, Any], where: Where, prompt: tuple[str, Any], answer: tuple[str, Any], format: str
) -> Sample:
    """A prompt and the completion that is trained, each either text or turns."""
    prompt_at, answer_at = where.at(prompt[0]), where.at(answer[0])
    plain = None
    whole = prompt[0] in ("messages", *TALK_NAMES)
    if isinstance(prompt[1], str) and not whole:
        turns = [{"role": "user", "content": plain_text(prompt[1], prompt_at)}]
    else:
        turns = talk_of(prompt[1], prompt_at)
    if isinstance(answer[1], str):
        reply = [{"role": "assistant", "content": plain_text(answer[1], answer_at)}]
    elif isinstance(answer[1], list | tuple) and all(isinstance(one, str) for one in answer[1]):
        raise DataError(
            f"{answer_at}: needs one answer, not a list of {len(answer[1])} texts. Write the one that is to be trained."
        )
    else:
        reply = talk_of(answer[1], answer_at)
    system = _system(record, where, turns if turns[0]["role"] in RULES else reply)
    if isinstance(prompt[1], str) and isinstance(answer[1], str) and not system:
        plain = (prompt[1], answer[1])
    if whole and len(turns) > 1 and turns[-1]["role"] == "assistant":
        del turns[-1]  # the answer that was judged: the chosen one stands in its place
    turns, asked = joined(system + turns, reply, answer_at)
    return _chat(where.origin, format, turns, where, record=record, first_trained=asked, plain=plain)


def _prompt_completion(record: Mapping[str, Any], where: Where) -> Sample:
    names = pair_names(record)
    if names is None:
        prompt = _need(record, (*PROMPT_NAMES, "input"), where)
        return _pair(record, where, prompt, _need(record, COMPLETION_NAMES, where), "prompt_completion")
    prompt, answer = ((name, record[name]) for name in names)
    if answer[0] == CALLS:
        answer = (CALLS, [{"role": "function_call", "content": answer[1]}])
    return _pair(record, where, prompt, answer, "prompt_completion")


def _preference(record: Mapping[str, Any], where: Where) -> Sample:
    chosen = _need(record, ("chosen",), where)
    name = present(record, (*PROMPT_NAMES, "conversations", "instruction", "messages", "input"))
    if name is None:
        turns = transcript(chosen[1]) if isinstance(chosen[1], str) else chosen[1]
        if not isinstance(turns, list | tuple) or len(turns) < 2:
            refuse(
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
    name, value = _need(record, OUTPUT_NAMES, where)
    output = plain_text(value, where.at(name))
    extra = _extra_input(record, where)
    turns = _system(record, where)
    history = record.get("history")
    if not isinstance(history, list | tuple | None):
        refuse(where.at("history"), f"needs a list of [instruction, response], not {shown(history)}.")
    for index, past in enumerate(history or ()):
        at = where.at("history").at(index)
        if not isinstance(past, list | tuple) or len(past) != 2:
            refuse(at, f"needs [instruction, response], not {shown(past)}.")
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
    name = present(record, TEXT_NAMES) or TEXT_NAMES[0]
    return Sample(where.origin, "text", text=plain_text(record.get(name), where.at(name)))


def _tokens(record: Mapping[str, Any], where: Where) -> Sample:
    ids, mask = token_row(record, where)
    return Sample(where.origin, "tokens", input_ids=ids, mask=mask)


def _unpaired(record: Mapping[str, Any], where: Where) -> Sample:
    """A row of one answer with a verdict on it."""
    label = verdict_of(record)
    if not isinstance(label, bool):
        refuse(where.at(present(record, VERDICTS) or "label"), f"needs true or false, not {shown(label)}.")
    kinds = matching_formats({name: value for name, value in record.items() if name not in VERDICTS})
    if len(kinds) != 1 or kinds[0] not in LABELLED:
        refuse(where, f"a row with a label needs the fields of one of {', '.join(LABELLED)}.")
    return replace(_READERS[kinds[0]](record, where), format="unpaired_preference", rejected=not label)


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
