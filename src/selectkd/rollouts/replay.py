"""A buffer of the student's rollouts; the oldest leaves first."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from selectkd.data.rewrite import Rollout
from selectkd.data.vision import Images, Vision
from selectkd.errors import ConfigError, IntegrityError


@dataclass
class ReplayBuffer:
    """At most ``capacity`` texts, each with its prompt; a new one takes the place of the oldest. vision: the processor
    of the prompts' images, whose tensors are made again when a text is trained on.

    >>> buffer = ReplayBuffer(2)
    >>> for token in (1, 2, 3):
    ...     buffer.add(Rollout([0], [token], stream=0))
    >>> buffer.at(0.0).completion, buffer.at(0.9).completion, len(buffer)
    ([2], [3], 2)
    """

    capacity: int
    texts: list[Rollout] = field(default_factory=list)
    vision: Vision | None = None

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"a replay buffer of {self.capacity} texts holds none; give it 1 or more.")

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def full(self) -> bool:
        return len(self.texts) >= self.capacity

    def add(self, text: Rollout) -> None:
        """Keeps one text."""
        if text.images is not None:  # its tensors are a view of a whole batch's
            text = replace(text, images=replace(text.images, loaded=None))
        self.texts.append(text)
        del self.texts[: -self.capacity]

    def at(self, uniform: float) -> Rollout:
        """The text at a number in [0, 1): each with the same probability."""
        return self.texts[min(int(uniform * len(self.texts)), len(self.texts) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """The texts as plain data; their tokens are shared with the buffer, which never changes a text."""
        return {"texts": [{**vars(text), "images": _plain(text.images)} for text in self.texts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        texts = [dict(text) for text in state["texts"]]
        self.texts = [Rollout(**{**text, "images": self._images(text.get("images"))}) for text in texts]

    def _images(self, plain: dict[str, Any] | None) -> Images | None:
        if plain is None:
            return None
        if self.vision is None:
            raise IntegrityError(
                "a replay buffer of a checkpoint shows images, and the student sees none. Start over in another "
                "training.output_dir."
            )
        return Images(plain["refs"], plain["key"], plain["spans"], plain["prefix"], self.vision)


def _plain(images: Images | None) -> dict[str, Any] | None:
    """What ``Images`` is made of beside its processor."""
    if images is None:
        return None
    return {name: getattr(images, name) for name in ("refs", "key", "spans", "prefix")}
