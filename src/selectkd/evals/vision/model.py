"""A model that sees images as an answerer: prompts by its template and processor, texts by ``rollouts.generate``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from selectkd.data.alignment import template_fingerprint
from selectkd.data.chat import images_in, rendered
from selectkd.data.formats import to_sample
from selectkd.data.images import ImageRules
from selectkd.data.template import ChatTemplate
from selectkd.data.vision import Images, Vision
from selectkd.errors import ConfigError
from selectkd.evals.asking import Decoding, identity, text_of
from selectkd.evals.runs import load_student
from selectkd.evals.vision.asking import Message
from selectkd.models.load import Loaded, load_vision
from selectkd.rollouts.batch_memory import Request
from selectkd.rollouts.generate import Ends, ends_of, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling


@dataclass(frozen=True)
class VisionModel:
    """A loaded model with its processor. ``answers[i]`` is that to ``chats[i]``, whatever the other chats are."""

    loaded: Loaded
    vision: Vision
    decoding: Decoding

    @classmethod
    def of(
        cls,
        spec: str | os.PathLike[str],
        decoding: Decoding,
        *,
        dtype: str,
        device: torch.device | str = "cpu",
    ) -> VisionModel:
        """The student of a run folder, or the model of a folder or on the hub; ConfigError where it sees no images."""
        left = Path(spec).expanduser() / "student"
        vision = load_vision(left if left.is_dir() else spec)
        if vision is None:
            raise ConfigError(
                f"{spec} sees no images, or its folder has no processor. Name a model that sees images."
            )
        return cls(load_student(spec, dtype=dtype, device=device), vision, decoding)

    @property
    def identity(self) -> list[Any]:
        """Weights, dtype, processor, template and decoding."""
        return self._identity

    @cached_property
    def _identity(self) -> list[Any]:
        tokenizer = self.loaded.tokenizer
        template = template_fingerprint(tokenizer) if tokenizer.chat_template else None
        return [*identity(self.loaded), self.vision.fingerprint, template, asdict(self.decoding)]

    def __call__(self, chats: Sequence[list[Message]]) -> list[str]:
        tokenizer, decoding = self.loaded.tokenizer, self.decoding
        ends = ends_of(tokenizer, self.loaded.model)
        requests = []
        for chat in chats:
            ids, images = self.prompt(chat)
            requests.append(Request(ids, decoding.max_new_tokens, images=images))
        found = generate(
            [self.loaded.model], requests, Draw(Sampling(decoding.temperature, decoding.top_p)),
            ends=Ends(ends, decoding.stop, tokenizer.decode), width=len(tokenizer), seed=decoding.seed,
        )  # fmt: skip
        return [text_of(one.ids, tokenizer, ends, decoding.stop) for one in found]

    def prompt(self, chat: list[Message], origin: str = "the question") -> tuple[list[int], Images]:
        """(ids, images) of a chat: its template's text with the generation prompt, each image as its processor has it.

        Without a template the images stand first, then the text. DataError where an image cannot be read or the
        placeholders of the text are not as many as the images.
        """
        tokenizer, vision = self.loaded.tokenizer, self.vision
        sample = to_sample({"messages": chat}, "messages", origin=origin)
        refs = vision.opened(sample.images, ImageRules())
        if tokenizer.chat_template:
            text = rendered(sample, ChatTemplate.of(tokenizer), list(sample.messages or ()), prompt=True)
            wide = vision.widened(text, refs, [part.place for part in sample.images], origin)
            encoded = tokenizer(wide.text, add_special_tokens=False, return_offsets_mapping=True)
            ids, spans = list(encoded["input_ids"]), list[int]()
            for begin, end in wide.spans:
                inside = [
                    at for at, (one, two) in enumerate(encoded["offset_mapping"]) if one < end and two > begin
                ]
                spans += [inside[0], inside[-1] + 1]
        else:
            texts = [part["text"] for part in chat[-1]["content"] if part["type"] == "text"]
            ids, within = vision.prompt_tokens("".join(texts), refs, origin)
            spans = list(within)
        return ids, images_in(ids, [False] * len(ids), spans, refs, sample, vision)
