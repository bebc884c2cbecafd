"""A training row, and a sample that is left out."""

from __future__ import annotations

from dataclasses import dataclass

from selectkd.data.prompts import KEYS
from selectkd.data.vision import Images


@dataclass(frozen=True)
class Example:
    """One training row: ``completion[i]`` says whether token i is trained; token 0 never is, nothing precedes it.

    truncated: tokens are missing, cut_prompt: of its prompt. without_tools: its text leaves its tool schemas out.
    route: which of several teachers its record names, -1 where none is asked for. prompt: the keys of its record's
    prompt (``data.prompts``), by which duplicates and rewordings are found. images: those it shows.
    """

    input_ids: list[int]
    completion: list[bool]
    stream: int = 0
    origin: str = ""
    truncated: bool = False
    cut_prompt: bool = False
    without_tools: bool = False
    route: int = -1
    prompt: bytes = bytes(8 * KEYS)
    images: Images | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Dropped:
    """A sample that is left out by policy, and why; reasons are counted, never silent."""

    origin: str
    reason: str
