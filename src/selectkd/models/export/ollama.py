"""An Ollama Modelfile beside a GGUF file.

Ollama renders chats with Go templates, and a GGUF file holds a Jinja one. `ollama create` looks for the Jinja text
among those it knows. So that nothing rests on that, a known shape of chat is written as a Go template, once it has
been seen to give the very texts of the Jinja template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Turns = Sequence[Mapping[str, str]]

CHATS: tuple[Turns, ...] = (
    ({"role": "user", "content": "One?"},),
    ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"}),
    (
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Two."}, {"role": "user", "content": "Three?"},
    ),
)  # fmt: skip
"""The chats that a Go template is compared on."""


@dataclass(frozen=True)
class Shape:
    """A common shape of chat: what stands around each role's text, before the first turn and before an answer."""

    before: str
    around: Mapping[str, tuple[str, str]]
    answer: str

    def text(self, turns: Turns) -> str:
        """A chat up to the place of the next answer."""
        parts = [
            self.around[turn["role"]][0] + turn["content"] + self.around[turn["role"]][1] for turn in turns
        ]
        return self.before + "".join(parts) + self.answer

    def go(self) -> str:
        """The same as a Go template over ``.Messages``."""
        cases = "".join(
            '{{- if eq .Role "ROLE" }}BEFORE{{ .Content }}BEHIND{{ end }}'.replace("ROLE", role)
            .replace("BEFORE", before)
            .replace("BEHIND", behind)
            for role, (before, behind) in self.around.items()
        )
        return f"{self.before}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{self.answer}"


def _alike(opened: str, closed: str, roles: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {role: (opened.replace("ROLE", name), closed) for role, name in roles.items()}


PLAIN = {"system": "system", "user": "user", "assistant": "assistant"}
SHAPES = (
    Shape("", _alike("<|im_start|>ROLE\n", "<|im_end|>\n", PLAIN), "<|im_start|>assistant\n"),
    Shape(
        "", _alike("<|start_header_id|>ROLE<|end_header_id|>\n\n", "<|eot_id|>", PLAIN),
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    Shape("", _alike("<|ROLE|>\n", "<|end|>\n", PLAIN), "<|assistant|>\n"),
    Shape(
        "", _alike("<start_of_turn>ROLE\n", "<end_of_turn>\n", {"user": "user", "assistant": "model"}),
        "<start_of_turn>model\n",
    ),
)  # fmt: skip


def modelfile(file: str, tokenizer: Any, context: int) -> tuple[str, list[str]]:
    """(the Modelfile of a GGUF file, notes on its template)."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {min(context, 8192)}"]
    if not tokenizer.chat_template:
        return "\n".join([*lines, "TEMPLATE {{ .Prompt }}"]) + "\n", [
            "no chat template: prompts are taken as they are"
        ]
    found = _found(tokenizer)
    if found is None:
        note = (
            "the chat template is none that is written for Ollama here: `ollama create` chooses by the Jinja template "
            "in the GGUF file; compare its texts before use"
        )
        return "\n".join([*lines, f"# {note}"]) + "\n", [note]
    shape, system, refused = found
    lines.append(f'TEMPLATE """{shape.go()}"""')
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    stops = {behind.strip() for _, behind in shape.around.values()}
    lines += [f'PARAMETER stop "{stop}"' for stop in sorted(stops)]
    note = f"the Go template gives the texts of the chat template on {len(CHATS) - len(refused)} chats"
    return "\n".join(lines) + "\n", [note]


def _found(tokenizer: Any) -> tuple[Shape, str | None, list[Turns]] | None:
    """(the shape that gives the texts of a chat template, its system text where none is given, chats it refuses)."""
    bos = tokenizer.bos_token or ""
    texts, refused = [], []
    for turns in CHATS:
        text = _rendered(tokenizer, turns)
        texts.append(text)
        refused += [turns] if text is None else []
    if len(refused) == len(CHATS):
        return None
    for shape in SHAPES:
        system = _default_system(shape, texts[0] or "", bos)
        pairs = [(turns, text) for turns, text in zip(CHATS, texts, strict=True) if text is not None]
        if all(_same(shape, turns, text, bos, system) for turns, text in pairs):
            return shape, system, refused
    return None


def _rendered(tokenizer: Any, turns: Turns) -> str | None:
    """A chat by the Jinja template; None where the template refuses it, as Gemma's does a system turn."""
    from jinja2.exceptions import TemplateError

    try:
        return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None


def _default_system(shape: Shape, text: str, bos: str) -> str | None:
    """The system text that a template puts before a chat without one."""
    if "system" not in shape.around:
        return None
    before, behind = shape.around["system"]
    text = (
        text if text.startswith(before) else text.removeprefix(bos)
    )  # a token that opens a turn may be bos as well
    if not text.startswith(before) or behind not in text:
        return None
    return text[len(before) : text.index(behind)]


def _same(shape: Shape, turns: Turns, text: str, bos: str, system: str | None) -> bool:
    roles = {turn["role"] for turn in turns}
    if not roles <= set(shape.around):
        return False
    if "system" not in roles and system is not None:
        turns = [{"role": "system", "content": system}, *turns]
    return text in (shape.text(turns), bos + shape.text(turns))
