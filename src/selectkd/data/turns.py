"""Turns of a conversation: roles under their many names, checked one by one, in the order a template can
render.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selectkd.data.calls import function_of, legacy_call, spoken_calls, tool_calls
from selectkd.data.fields import Where, from_json, plain_text, refuse, shown
from selectkd.data.image_parts import COLUMNS, MEDIA, columns_of, filled, image_part, with_own_images
from selectkd.data.jinja_process import REASONING
from selectkd.errors import DataError

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
    "function_call": "assistant",
}

TEXTS = ("text", "input_text", "output_text")
"""Types of a part that is text: of chats, and of OpenAI's newer interface for what was asked and answered."""
SWITCHES = {
    "train": True,
    "training": True,
    "trainable": True,
    "loss": True,
    "loss_mask": True,
    "masked": False,
}
"""Fields of a turn that say whether it is trained and the value that says so: Axolotl's, ms-swift's, torchtune's."""
ANY_SWITCH = re.compile(r"(?:^|_)(?:train(?:ed|able|ing)?|loss|mask(?:ed|s)?)(?:_|$)")
"""Names of fields that may be such a switch where they hold true or false."""

PAIRS = (("input", "output"), ("user", "assistant"))
"""Fields of a question and its answer in one item of a conversation."""
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")
"""What parts the turns of a conversation written as one text (HH-RLHF)."""

# Which role may come directly after which; None is the start of the conversation.
FOLLOWS = {
    "system": (None,),
    "developer": (None, "system"),
    "user": (None, "user", "system", "developer", "assistant", "tool"),
    "assistant": ("system", "developer", "user", "tool"),
    "tool": ("assistant", "tool"),
}


def role_of(name: Any) -> str | None:
    """The role that a name means, in whatever case; None where it means none."""
    return ROLES.get(name.strip().lower()) if isinstance(name, str) else None


def is_call(item: Any) -> bool:
    """Whether a turn is nothing but calls of tools, by its role."""
    name = (item.get("role") or item.get("from")) if isinstance(item, Mapping) else None
    return isinstance(name, str) and name.strip().lower() == "function_call"


def turn_of(item: Any, where: Where) -> dict[str, Any]:
    """One turn as {role, content, ...}; other fields of the turn reach the template untouched.

    Takes role/content and from/value. Content may be text, a list of text parts, or null beside tool_calls. The
    arguments of a call that are JSON text become the object they mean; OpenAI's older ``function_call`` is one call.
    """
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: needs a turn such as {{role, content}}, not {type(item).__name__}.")
    turn = {str(name): value for name, value in item.items() if value is not None}
    role_name, text_name = ("role", "content") if "role" in turn else ("from", "value")
    given_role = turn.pop(role_name, None)
    role = role_of(given_role)
    if role is None:
        shown = repr(given_role)[:60]
        raise DataError(
            f"{where}.{role_name}: no role is called {shown}. What would work: {', '.join(sorted(ROLES))}."
        )
    content = turn.pop(text_name, None)
    at = where.at(text_name)
    if is_call(item):
        turn["tool_calls"], content = spoken_calls(content, at), ""
    elif "tool_calls" in turn:
        turn["tool_calls"] = tool_calls(turn["tool_calls"], where.at("tool_calls"))
        if not turn["tool_calls"]:
            del turn["tool_calls"]
    legacy = legacy_call(turn.pop("function_call", None), where.at("function_call"))
    if legacy:
        if role != "assistant" or turn.get("tool_calls"):
            raise DataError(
                f"{where}.function_call: stands in a turn of {role} or beside other calls. What would work: one "
                "function_call in a turn of the assistant, or tool_calls."
            )
        turn["tool_calls"] = legacy
    if content is None and turn.get("tool_calls"):
        content = ""
    turn["content"] = _content(content, at, turn, role)
    for name in ("name", "tool_call_id", *REASONING):
        if name in turn:
            plain_text(turn[name], where.at(name))
    if "weight" in turn and (isinstance(turn["weight"], bool) or turn["weight"] not in (0, 1)):
        raise DataError(
            f"{where}.weight: needs 1 (trained) or 0 (not trained), not {repr(turn['weight'])[:60]}."
        )
    for name in [name for name in turn if ANY_SWITCH.search(name.lower())]:
        turn["weight"] = int(_trained(turn, name, where) and turn.get("weight", 1))
    return with_own_images({"role": role, **turn}, where)


def _trained(turn: dict[str, Any], name: str, where: Where) -> bool:
    """Whether a switch of a turn, which is taken out, has it trained; a field that is none stays."""
    given = turn[name]
    yes_or_no = isinstance(given, bool | int | float) and given in (0, 1)
    if name not in SWITCHES:
        if yes_or_no:
            raise DataError(
                f"{where}.{name}: no switch of training is called so. What would work: {', '.join(SWITCHES)}. Rename "
                "it, or take it out."
            )
        return True
    if not yes_or_no:
        on, off = ("true", "false") if SWITCHES[name] else ("false", "true")
        raise DataError(
            f"{where}.{name}: needs {on} (trained) or {off} (not trained), not {repr(given)[:60]}."
        )
    del turn[name]
    return bool(given) is SWITCHES[name]


def add_turns(turns: list[dict[str, Any]], item: Any, where: Where) -> None:
    """Adds those of an item to ``turns``. Calls directly after calls, in turns of nothing else, become one turn's."""
    new = turns_of(item, where, before=turns)
    bare = [{**turn, "tool_calls": ()} for turn in (*turns[-1:], new[0])]
    if is_call(item) and turns and turns[-1].get("tool_calls") and bare[0] == bare[1]:
        new[0]["tool_calls"] = [*turns.pop()["tool_calls"], *new[0]["tool_calls"]]
    turns += new


def turns_of(item: Any, where: Where, *, before: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """``turn_of`` an item; results of tools among the parts of a user's turn are turns of their own, before the rest.

    before: the turns before it, whose calls give the results their names.
    """
    parts = item.get("content") if isinstance(item, Mapping) else None
    if not isinstance(parts, list | tuple) or not any(_kind(part) == "tool_result" for part in parts):
        return [turn_of(item, where)]
    if role_of(item.get("role")) != "user":
        raise DataError(f"{where}: only a user's turn can have parts of type tool_result.")
    calls = (call for turn in before for call in turn.get("tool_calls") or ())
    names = {str(call.get("id")): {"name": call.get("function", call)["name"]} for call in calls}
    turns: list[dict[str, Any]] = []
    rest: list[Any] = []
    for index, part in enumerate(parts):
        at = where.at("content").at(index)
        if _kind(part) != "tool_result":
            rest.append(_part(part, at))
        elif rest:
            raise DataError(f"{at}: a tool_result behind other parts. Put the results of tools first.")
        else:
            result = {name: value for name, value in part.items() if name != "type" and value is not None}
            call = result.pop("tool_use_id", None)
            named = {} if call is None else {"tool_call_id": call, **names.get(str(call), {})}
            turns.append(turn_of({"content": "", **result, "role": "tool", **named}, at))
    return [*turns, turn_of({**item, "content": rest}, where)] if rest else turns


def pair_of(item: Mapping[str, Any]) -> tuple[str, str] | None:
    """The fields of a question and its answer where an item of a conversation is both."""
    if {"role", "from"} & item.keys():
        return None
    return next((pair for pair in PAIRS if item.keys() >= {*pair}), None)


def talk_of(value: Any, where: Where) -> list[dict[str, Any]]:
    """Turns as messages in the role/content shape: a list of turns or one alone, texts that take turns, pairs of
    {input, output} or {user, assistant}, or a transcript.
    """
    items = [value] if isinstance(value, Mapping) else value
    if isinstance(value, str):
        items = from_json(value) if value.lstrip()[:1] == "[" else transcript(value)
    if not isinstance(items, list | tuple) or not items:
        refuse(where, f"needs text or a list of turns, not {shown(value)}.")
    if len(items) > 1 and all(isinstance(item, str) for item in items):
        items = [
            {"role": ("user", "assistant")[index % 2], "content": item} for index, item in enumerate(items)
        ]
    turns: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        at = where.at(index)
        pair = pair_of(item) if isinstance(item, Mapping) else None
        if pair is not None:
            question, answer = pair
            asked = {"role": "user", "content": plain_text(item[question], at.at(question))}
            seen = {name: item[name] for name in (*COLUMNS, *MEDIA) if name in item}
            turns.append(with_own_images({**seen, **asked}, at))
            turns.append({"role": "assistant", "content": plain_text(item[answer], at.at(answer))})
        else:
            add_turns(turns, item, at)
    return turns


def transcript(text: str) -> list[dict[str, Any]]:
    """The turns of a conversation written as one text, empty where it is none."""
    _, *parts = TRANSCRIPT.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": part.strip()}
        for who, part in zip(parts[::2], parts[1::2], strict=True)
    ]


def text_of(content: Any) -> str:
    """The text of a turn's content, of parts their texts together."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content or ())


def _content(content: Any, where: Where, turn: dict[str, Any], role: str) -> str | list[dict[str, Any]]:
    """Text, or a list of parts, text and images; parts of reasoning and calls of tools become those of ``turn``."""
    if not isinstance(content, list | tuple):
        return plain_text(content, where)
    parts, thoughts, calls = [], [], []
    for index, part in enumerate(content):
        thought, at = _thought(part), where.at(index)
        if thought is not None:
            thoughts.append(plain_text(thought, at))
        elif _kind(part) == "tool_use" and role == "assistant":
            about = {"name": part.get("name"), "arguments": part.get("input")}
            name = {"id": plain_text(part["id"], at.at("id"))} if part.get("id") is not None else {}
            calls.append({"type": "function", **name, "function": function_of(about, at)})
        elif calls:
            raise DataError(f"{at}: a part behind a tool_use, where templates write none. Put calls last.")
        else:
            parts.append(_part(part, at))
    if calls:
        turn["tool_calls"] = [*turn.get("tool_calls", ()), *calls]
    if thoughts and not any(name in turn for name in REASONING):
        turn[REASONING[0]] = "\n\n".join(thoughts)
    return parts


def _kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, Mapping) else None


def _thought(part: Any) -> Any:
    """The text of a part of reasoning, {type: thinking, thinking: text or text parts}; None for any other part."""
    kind = _kind(part)
    if kind not in ("thinking", "reasoning"):
        return None
    text = part.get(kind, part.get("text", ""))
    return text_of(text) if isinstance(text, list) and all(isinstance(one, Mapping) for one in text) else text


def _part(part: Any, where: Where) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": plain_text(part, where)}
    if isinstance(part, Mapping) and part.get("type") in TEXTS:
        plain_text(part.get("text"), where.at("text"))
        for name in (*columns_of(part), *(name for name in MEDIA if filled(part.get(name)))):
            raise DataError(
                f"{where}: a part of type {part['type']} with something in {name!r}. Make it two parts."
            )
        return {str(name): value for name, value in part.items() if value is not None} | {"type": "text"}
    image = image_part(part, where) if isinstance(part, Mapping) else None
    if image is not None:
        return image
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise DataError(f"{where}: a part of type {repr(kind)[:40]}; what is read is text and images.")


def check_order(messages: Sequence[Mapping[str, Any]], where: Where) -> None:
    """Nothing when every role may come after the one before it; else DataError naming the turn."""
    before: str | None = None
    for index, message in enumerate(messages):
        role = message["role"]
        if before not in FOLLOWS[role]:
            allowed = ", ".join(name or "the start" for name in FOLLOWS[role])
            raise DataError(
                f"{where}: turn {index} has role {role!r} after {before or 'the start'}; it may "
                f"follow {allowed}."
            )
        before = role


def without_end(message: Mapping[str, Any], ends: Collection[str]) -> Mapping[str, Any]:
    """An assistant's message whose text does not bring the token that ends its turn: the template writes it.

    >>> without_end({"role": "assistant", "content": "Oslo.</s>"}, {"</s>"})["content"]
    'Oslo.'
    """
    content = message.get("content")
    if message["role"] != "assistant" or not content:
        return message
    if isinstance(content, str):
        return {**message, "content": _text_without_end(content, ends)}
    *first, last = content
    if "text" in last:
        last = {**last, "text": _text_without_end(last["text"], ends)}
    return {**message, "content": [*first, last]}


def _text_without_end(text: str, ends: Collection[str]) -> str:
    kept = text
    while end := next((one for one in ends if kept.rstrip().endswith(one)), None):
        kept = kept.rstrip().removesuffix(end)
    return text if kept == text else kept.rstrip()
