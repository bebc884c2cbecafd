"""A sample as tokens: ids, which of them are trained, and what was cut to fit.

With a chat template, prompt + completion and instruction rows become a user and an assistant message. Without
one, prompt + completion is joined as it stands and instruction rows are written in the Alpaca layout; each
ends in EOS.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from selectkd.data.chat import Sight, Text, images_in, leaves_out_tools, tokenize_chat, turn_ends
from selectkd.data.encoding import Encoded, Encoder, eos_ids_of
from selectkd.data.example import Dropped, Example
from selectkd.data.files import OnBad
from selectkd.data.formats import Sample
from selectkd.data.image_parts import without_marks
from selectkd.data.images import ImageRef
from selectkd.data.plain import behind_start, joined, single_end
from selectkd.data.positions import TrainTurns, whole_text
from selectkd.data.prompts import images_asked, prompt_of, with_images
from selectkd.data.rounds import Keys, Steps, Tokens, alone
from selectkd.data.shorter import images_before, shorter
from selectkd.data.template import ChatTemplate
from selectkd.data.turns import text_of
from selectkd.data.unread import check_seen
from selectkd.data.windows import Window
from selectkd.errors import ConfigError, DataError

OnTooLong = Literal["truncate", "drop", "error"]
TrainOn = Literal["completion", "all"]


_Text = tuple[list[int], list[bool], tuple[int, ...]]
"""The ids of a text, which of them are trained, and the numbers of its trained turns."""


def pad_id_of(tokenizer: Any) -> int:
    """The id to fill up with: the pad token, else EOS, else 0. Which one never matters: length decides, not
    the id.
    """
    ends = sorted(eos_ids_of(tokenizer))
    pad = getattr(tokenizer, "pad_token_id", None)
    return pad if isinstance(pad, int) else ends[0] if ends else 0


@dataclass(frozen=True)
class TextRules:
    """What of a record is trained, in how many tokens, and what a conversation has by default.

    max_length: most tokens of a sample, at least 2. max_prompt_length: most tokens before the first trained one, from 1
    to max_length - 1; None for no limit. system, tools: of conversations without any of their own. Raises ConfigError
    for a value that cannot be.
    """

    max_length: int = 1024
    max_prompt_length: int | None = None
    on_too_long: OnTooLong = "truncate"
    on_bad_record: OnBad = "error"
    train_on: TrainOn = "completion"
    train_turns: TrainTurns = "all"
    system: str | None = None
    tools: tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        for name, kinds in (
            ("on_too_long", OnTooLong),
            ("on_bad_record", OnBad),
            ("train_on", TrainOn),
            ("train_turns", TrainTurns),
        ):
            if getattr(self, name) not in get_args(kinds):
                known = ", ".join(get_args(kinds))
                raise ConfigError(f"{name} is {getattr(self, name)!r}. What would work: {known}.")
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; a token and the one it predicts need at least 2."
            )
        if self.max_prompt_length is not None and not 1 <= self.max_prompt_length < self.max_length:
            raise ConfigError(
                f"max_prompt_length is {self.max_prompt_length}; it must lie from 1 to max_length - 1 = "
                f"{self.max_length - 1}."
            )


def render(
    sample: Sample,
    tokenizer: Any,
    rules: TextRules,
    *,
    stream: int = 0,
    eos_ids: Collection[int] = (),
    template: ChatTemplate | None = None,
) -> list[Example | Dropped]:
    """The sample as one ``Example`` or more of at most ``max_length`` tokens; in place of one that is left out,
    ``Dropped`` with the reason.

    A conversation is several examples where its template changes earlier turns (``data.positions``). A prompt is cut to
    ``max_prompt_length``: a conversation loses its oldest turns and keeps its system prompt (``data.shorter``), other
    text is cut on its left (a BOS stays). The whole is cut on its right; a completion that was cut gets no EOS.

    eos_ids: what ends a turn beside the tokenizer's EOS. template: the tokenizer's, unless given. Raises DataError
    naming the row.
    """
    template = ChatTemplate.of(tokenizer) if template is None else template
    encoder = Encoder(tokenizer)
    found = alone(rendering(sample, encoder, rules, template, eos_ids), template.answers, encoder)
    return [replace(one, stream=stream) if isinstance(one, Example) else one for one in found]


def rendering(
    sample: Sample,
    encoder: Encoder,
    rules: TextRules,
    template: ChatTemplate,
    eos_ids: Collection[int] = (),
    sight: Sight | None = None,
) -> Steps[list[Example | Dropped]]:
    """``render``, together with other samples. sight: of a model that sees images; a sample that would lose one of them
    is left out.
    """
    if (reason := _left_out(sample)) is not None:
        return [Dropped(sample.origin, reason)]
    messages, sees = sample.messages or (), sight is not None
    check_seen(messages, sample.origin, sees=sees, images=len(sample.images), fields=sample.unread)
    sample = _with_defaults(sample, rules)
    texts = yield from _texts(sample, encoder, encoder.ends(eos_ids), rules, template, sight)
    if not texts:
        return [Dropped(sample.origin, "no final answer")]
    without_tools = yield from leaves_out_tools(sample, template)
    prompt: bytes = yield Keys(prompt_of(sample))
    if count := images_asked(sample):  # the same keys for all texts of a record
        refs = () if texts[0][3] is None else texts[0][3].refs[:count]
        prompt = with_images(prompt, [ImageRef.unpacked(ref).digest for ref in refs])
    results: list[Example | Dropped] = []
    waiting = [(sample, text) for text in texts]
    while waiting:
        talk, (ids, trained, turns, images) = waiting.pop(0)
        if ids:
            trained[0] = False
        if not any(trained):
            results.append(Dropped(sample.origin, "nothing to train on"))
            continue
        too_long = bool(turns) and _too_long(trained, rules)
        sizes = () if images is None else [end - begin for begin, end in images.places]
        length, most = trained.index(True), rules.max_prompt_length or 0
        less = (yield from shorter(talk, turns, length, most, sizes)) if too_long else None
        if less is not None:
            if images_before(talk, turns) and not images_before(less, less.trained):
                results.append(Dropped(sample.origin, "its images would be cut"))
                continue
            texts = yield from _texts(less, encoder, encoder.ends(eos_ids), rules, template, sight)
            waiting[:0] = [(less, text) for text in texts]
        elif too_long:
            results.append(Dropped(sample.origin, "prompt longer than max_prompt_length"))
        else:
            example = Example(
                ids, trained, origin=sample.origin, without_tools=without_tools, prompt=prompt, images=images
            )
            results.append(_fit(example, rules, ids[0] == encoder.bos, cut_prompt=talk is not sample))
    return results


def _left_out(sample: Sample) -> str | None:
    """Why a sample is left out before it is rendered; None where it is not."""
    if sample.rejected:
        return "labelled false"
    if sample.messages is None or sample.trained:
        return None
    replies = [message for message in sample.messages if message["role"] == "assistant"]
    written = any(message.get("tool_calls") or text_of(message["content"]).strip() for message in replies)
    return "every answer has weight 0" if written else "empty completion" if replies else "no completion"


def _too_long(trained: list[bool], rules: TextRules) -> bool:
    """Whether a prompt is to be made shorter."""
    most = rules.max_prompt_length
    return rules.on_too_long == "truncate" and most is not None and trained.index(True) > most


def _with_defaults(sample: Sample, rules: TextRules) -> Sample:
    """The sample with the system prompt and the tools that conversations without any are given."""
    messages = sample.messages
    if messages is None:
        return sample
    if rules.tools and sample.tools is None:
        sample = replace(sample, tools=rules.tools)
    if rules.system is None or messages[0]["role"] in ("system", "developer"):
        return sample
    first = {"role": "system", "content": rules.system}
    trained = tuple(number + 1 for number in sample.trained)
    # Without a template the prompt would be written alone: such a row needs one from here on.
    return replace(sample, messages=(first, *messages), trained=trained, completion=None)


def _texts(
    sample: Sample,
    encoder: Encoder,
    eos_ids: frozenset[int],
    rules: TextRules,
    template: ChatTemplate,
    sight: Sight | None,
) -> Steps[list[Text]]:
    """The tokens of each text of a sample, with its images where the model sees."""
    if sight is None:
        plain = yield from _tokenize(sample, encoder, eos_ids, rules, template)
        return [(*text, None) for text in plain]
    if sample.messages is not None and (template.source or sample.completion is None):
        if rules.train_on == "all":
            raise DataError(
                f"{sample.origin}: data.train_on: all is not read for a model that sees images. Use completion."
            )
        window = Window(rules.max_length, rules.max_prompt_length)
        texts = yield from tokenize_chat(
            sample,
            encoder,
            template,
            eos_ids=eos_ids,
            window=window,
            train_turns=rules.train_turns,
            sight=sight,
        )
        return texts
    if sample.images:
        seen = yield from _joined_to_images(sample, encoder, eos_ids, sight)
        return [seen]
    if sight.vision.token_types == "prefix":
        raise DataError(
            f"{sample.origin}: has no image, and a prompt of {type(sight.vision.processor).__name__} begins with one. "
            "Leave the row out."
        )
    plain = yield from _tokenize(sample, encoder, eos_ids, rules, template)
    return [
        (ids, trained, turns, images_in(ids, trained, (), (), sample, sight.vision))
        for ids, trained, turns in plain
    ]


def _joined_to_images(sample: Sample, encoder: Encoder, eos_ids: frozenset[int], sight: Sight) -> Steps[Text]:
    """Images, prompt and completion without a template, as the model's processor lays out a prompt (PaliGemma's)."""
    vision = sight.vision
    refs = vision.opened(sample.images, sight.rules)
    asked = (sample.prompt,) if sample.instruction is None else sample.instruction
    prompt = without_marks("\n\n".join(part for part in asked if part))
    before, spans = vision.prompt_tokens(prompt, refs, sample.origin)
    answer: Encoded = yield Tokens(sample.completion or "")
    after = [*answer.ids, *encoder.end]
    ids, trained = single_end([*before, *after], [False] * len(before) + [True] * len(after), eos_ids)
    return ids, trained, (), images_in(ids, trained, spans, refs, sample, vision)


def _tokenize(
    sample: Sample, encoder: Encoder, eos_ids: frozenset[int], rules: TextRules, template: ChatTemplate
) -> Steps[list[_Text]]:
    """Each text of a sample."""
    window = Window(rules.max_length, rules.max_prompt_length)
    if sample.input_ids is not None:
        return [(*_pretokenised(sample, encoder.tokenizer, rules.train_on), ())]
    if sample.text is not None:
        if not sample.text.strip():
            return [([], [], ())]
        found: Encoded = yield Tokens(window.of(sample.text, 0, encoder.tokenizer).text)
        ids = behind_start(found.ids, encoder) + encoder.end
        return [(*single_end(ids, [True] * len(ids), eos_ids), ())]
    if template.source or sample.completion is None:
        if rules.train_on == "all" and template.source:
            ends = encoder.signs(turn_ends(template, encoder.tokenizer, eos_ids, sample))
            text = yield from whole_text(sample, template, ends=ends)
            found = yield Tokens(window.of(text, 0, encoder.tokenizer).text)
            return [(list(found.ids), [True] * len(found.ids), ())]
        texts = yield from tokenize_chat(
            sample, encoder, template, eos_ids=eos_ids, window=window, train_turns=rules.train_turns
        )
        return [(ids, trained, turns) for ids, trained, turns, _ in texts]
    plain = yield from joined(sample, encoder, eos_ids, rules.train_on, window)
    return [(*plain, ())]


def _pretokenised(sample: Sample, tokenizer: Any, train_on: str) -> tuple[list[int], list[bool]]:
    ids = list(sample.input_ids or ())
    size = len(tokenizer)
    for index, token in enumerate(ids):
        if not 0 <= token < size:
            raise DataError(
                f"{sample.origin}: input_ids[{index}] is {token}, but the tokenizer has ids 0 to "
                f"{size - 1}.\n"
                "Tokenise the data with the student's tokenizer."
            )
    mask = list(sample.mask or ())
    return ids, [True] * len(ids) if train_on == "all" else mask


def _fit(example: Example, rules: TextRules, keep_first: bool, *, cut_prompt: bool) -> Example | Dropped:
    """The example within its limits, by policy. cut_prompt: its prompt has been made shorter already."""
    max_length, max_prompt_length = rules.max_length, rules.max_prompt_length
    prompt = example.completion.index(True)
    long_prompt = max_prompt_length is not None and prompt > max_prompt_length
    if not long_prompt and len(example) <= max_length:
        return replace(example, truncated=cut_prompt, cut_prompt=cut_prompt)
    if rules.on_too_long == "error":
        what, limit = ("max_prompt_length", max_prompt_length) if long_prompt else ("max_length", max_length)
        size = prompt if long_prompt else len(example)
        raise DataError(
            f"{example.origin}: {size} tokens, but {what} is {limit}. Raise {what}, or use "
            "on_too_long: truncate | drop."
        )
    if rules.on_too_long == "drop":
        return Dropped(example.origin, "too long")
    ids, trained, images = example.input_ids, example.completion, example.images
    if long_prompt and max_prompt_length is not None:
        head = 1 if keep_first and max_prompt_length > 1 else 0
        cut = prompt - max_prompt_length + head
        ids, trained = ids[:head] + ids[cut:], trained[:head] + trained[cut:]
        if images is not None:
            if any(begin < cut and end > head for begin, end in images.places):
                return Dropped(example.origin, "image would be cut")
            images = images.moved(cut - head, head)
    ids, trained = ids[:max_length], trained[:max_length]
    if images is not None and any(end > max_length for _, end in images.places):
        return Dropped(example.origin, "image would be cut")
    if not any(trained):
        return Dropped(example.origin, "prompt fills max_length")
    return replace(
        example,
        input_ids=ids,
        completion=trained,
        truncated=True,
        cut_prompt=long_prompt or cut_prompt,
        images=images,
    )
