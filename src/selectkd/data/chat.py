"""Conversations to tokens: the tokenizer's own chat template renders, and positions say which tokens are
trained.

The mask never comes from searching the text for a response. It comes from the template's ``{% generation %}``
marks where it has them, else from rendering the conversation turn by turn: messages[:i] with the generation
prompt must be a prefix of messages[:i+1], and what the longer rendering adds is turn i.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from selectkd.data.formats import Sample
from selectkd.errors import DataError

GENERATION_MARK = re.compile(r"\{%-?\+?\s*generation\s*-?%\}")
# A template renders in microseconds to milliseconds; two seconds is the promise for one that never ends.
TEMPLATE_SECONDS = 1.5


def tokenize_chat(
    sample: Sample, tokenizer: Any, *, eos_ids: Collection[int]
) -> tuple[list[int], list[bool]]:
    """(ids, trained) of a conversation, its trained assistant turns marked, each with the EOS that ends the
    turn.

    Raises DataError naming the row when the template raises, never ends, renders earlier turns differently
    later on (no prefix), or marks nothing; and when the tokenizer cannot say which characters a token covers.
    """
    template = _template(sample, tokenizer)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{sample.origin}: {type(tokenizer).__name__} gives no character positions, so turns "
            "cannot be told apart.\n"
            "What would work: a fast tokenizer (a folder with tokenizer.json), or pre-tokenised "
            "input_ids + labels."
        )
    with _ends_in_time(sample.origin):
        if GENERATION_MARK.search(template):
            ids, runs = _by_marks(sample, tokenizer)
        else:
            ids, runs = _by_prefix(sample, tokenizer)
    trained = [False] * len(ids)
    for start, end in runs:
        for index in range(start, _turn_end(ids, start, end, tokenizer, eos_ids)):
            trained[index] = True
    if not any(trained):
        raise DataError(
            f"{sample.origin}: the chat template marks no token of the assistant turns as generated.\n"
            "Put {% generation %} ... {% endgeneration %} around the assistant's text in the template."
        )
    eos = tokenizer.eos_token_id
    last = runs[-1][1] if runs else 0
    ends_open = last == len(ids) and trained[-1] and ids[-1] not in eos_ids
    if isinstance(eos, int) and ends_open and ids[-1] not in set(tokenizer.all_special_ids):
        ids.append(eos)
        trained.append(True)
    return ids, trained


def rendered(
    sample: Sample, tokenizer: Any, messages: Sequence[dict[str, Any]], *, prompt: bool = False
) -> str:
    """The template's text of ``messages``, with the generation prompt when ``prompt``. Raises DataError."""
    return _call(
        sample,
        tokenizer,
        list(messages),
        tools=list(sample.tools) if sample.tools else None,
        tokenize=False,
        add_generation_prompt=prompt,
    )


def _template(sample: Sample, tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=list(sample.tools) if sample.tools else None))
    except (ValueError, AttributeError):
        raise DataError(
            f"{sample.origin}: a conversation, but the tokenizer has no chat template to render it with.\n"
            "What would work: the tokenizer of a chat model (its folder has chat_template.jinja), "
            "or rows of\n"
            "prompt + completion, instruction + output, or text, which need no template."
        ) from None


def _call(sample: Sample, tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> Any:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, **options)
    except DataError:
        raise
    except (
        jinja2.TemplateError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        roles = ", ".join(message["role"] for message in messages[:6])
        raise DataError(
            f"{sample.origin}: the chat template cannot render these turns ({roles}): "
            f"{type(error).__name__}: {' '.join(str(error).split())[:160]}.\n"
            "Change the row to what the template accepts, or skip such rows with `on_bad_record: skip`."
        ) from error


def _by_marks(sample: Sample, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and the token runs the template's generation marks give, those of untrained turns left out."""
    messages = list(sample.messages or ())
    out = _call(
        sample,
        tokenizer,
        messages,
        tools=list(sample.tools) if sample.tools else None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    ids, mask = list(out["input_ids"]), list(out["assistant_masks"])
    runs: list[tuple[int, int]] = []
    for index, value in enumerate(mask):
        if value and runs and runs[-1][1] == index:
            runs[-1] = (runs[-1][0], index + 1)
        elif value:
            runs.append((index, index + 1))
    # The marks end at the first token of their last character; the rest of an emoji belongs to it too.
    offsets = out["offset_mapping"]
    for number, (start, end) in enumerate(runs):
        while end < len(ids) and offsets[end][0] < offsets[end - 1][1]:
            end += 1
        runs[number] = (start, end)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(sample.trained) == len(turns):
        return ids, runs
    if len(runs) != len(turns):
        raise DataError(
            f"{sample.origin}: the chat template marks {len(runs)} runs of generated tokens for "
            f"{len(turns)} assistant\n"
            "turns, so the trained ones cannot be told from the others. Train all turns, or one turn per row."
        )
    return ids, [run for run, turn in zip(runs, turns, strict=True) if turn in sample.trained]


def _by_prefix(sample: Sample, tokenizer: Any) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids and the token runs of the trained turns, from the character positions where each turn begins and
    ends.
    """
    messages = list(sample.messages or ())
    text = rendered(sample, tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for turn in sample.trained:
        before = rendered(sample, tokenizer, messages[:turn], prompt=True)
        after = text if turn == len(messages) - 1 else rendered(sample, tokenizer, messages[: turn + 1])
        if not after.startswith(before):
            _refuse_prefix(sample, turn, "its generation prompt is not how the turn begins", before, after)
        if not text.startswith(after):
            _refuse_prefix(sample, turn, "later turns change how it is rendered", after, text)
        spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    starts = [start for start, _ in offsets]
    runs: list[tuple[int, int]] = []
    for begin, end in spans:
        # A token that begins before the turn belongs to the prompt: at generation time it is already written.
        inside = [index for index, start in enumerate(starts) if begin <= start < end]
        if inside:
            runs.append((inside[0], inside[-1] + 1))
    return ids, runs


def _refuse_prefix(sample: Sample, turn: int, problem: str, short: str, long: str) -> None:
    at = next(
        (i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), min(len(short), len(long))
    )
    raise DataError(
        f"{sample.origin}: turn {turn} has no position in the rendering: {problem}\n"
        f"(at character {at}: {short[at : at + 30]!r} against {long[at : at + 30]!r}).\n"
        "What would work: {% generation %} marks in the chat template, a row per assistant turn, or "
        "train_on: all."
    )


def _turn_end(ids: Sequence[int], start: int, end: int, tokenizer: Any, eos_ids: Collection[int]) -> int:
    """The end of a trained run: just after the EOS of the turn, be it inside the run or the first token
    behind it.

    Layout that the template writes behind the EOS (a newline, say) is not trained: no model is asked to write
    it.
    """
    if (
        end < len(ids)
        and ids[end] in eos_ids
        and not any(token in eos_ids for token in ids[max(start, end - 3) : end])
    ):
        return end + 1
    for index in range(end - 1, max(start, end - 8) - 1, -1):
        if ids[index] in eos_ids:
            return index + 1 if not tokenizer.decode(list(ids[index + 1 : end])).strip() else end
    return end


@contextmanager
def _ends_in_time(origin: str) -> Iterator[None]:
    """DataError when the block uses more than TEMPLATE_SECONDS of processor time (main thread, POSIX)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise DataError(
            f"{origin}: the chat template was still rendering after {TEMPLATE_SECONDS:g} s.\n"
            "It probably loops without end on this row; change the template, or leave the row out."
        )

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, TEMPLATE_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
