"""A buffer of the student's rollouts; the oldest leaves first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from selectkd.data.rewrite import Rollout
from selectkd.errors import ConfigError


@dataclass
class ReplayBuffer:
    """At most ``capacity`` texts, each with its prompt; a new one takes the place of the oldest.

    >>> buffer = ReplayBuffer(2)
    >>> for token in (1, 2, 3):
    ...     buffer.add(Rollout([0], [token], stream=0))
    >>> buffer.at(0.0).completion, buffer.at(0.9).completion, len(buffer)
    ([2], [3], 2)
    """

    capacity: int
    texts: list[Rollout] = field(default_factory=list)

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
        self.texts.append(text)
        del self.texts[: -self.capacity]

    def at(self, uniform: float) -> Rollout:
        """The text at a number in [0, 1): each with the same probability."""
        return self.texts[min(int(uniform * len(self.texts)), len(self.texts) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """The texts as plain data; their tokens are shared with the buffer, which never changes a text."""
        return {"texts": [dict(vars(text)) for text in self.texts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.texts = [Rollout(**text) for text in state["texts"]]
