"""The looks at a run's probe texts, as arrays. n supervised tokens, the same in every look; L looks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from selectkd.errors import DataError

Column = NDArray[Any]
POSITIONS = (0, 4, 16, 64, 256)
ENTROPIES = (0.0, 0.1, 0.5, 1.0, 2.0)
"""Bins as of ``training.heldout.breakdown``: places in the completion, and the teacher's entropy in nats."""
RANKS = (1, 2, 3, 4, 5, 6, 11, 51)
CONFIDENCES = 10
NEEDED = ("sample", "token", "label", "acceptance", "divergence", "weight")
COUNTED = ("sample", "token", "label", "proposal", "teacher_top", "rank")
FORMAT = 1
"""Of probe/texts.json, as this version writes it."""


@dataclass(frozen=True)
class Text:
    """A probe text: its stream and its tokens with their ids."""

    stream: str
    ids: list[int]
    tokens: list[str]


@dataclass(frozen=True)
class Look:
    """The columns [n] of one look, as ``training.heldout.tokens.look`` describes them, and the text of ids in them."""

    step: int
    rows: int  # of the whole probe; n is smaller where the file was capped
    columns: dict[str, Column]
    pieces: dict[int, str]

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    @property
    def accepted(self) -> Column:
        """Whether each token was accepted."""
        return self.columns["acceptance"] >= 0.5

    @property
    def unverified(self) -> Column:
        """Whether no verdict was possible."""
        return self.columns.get("unverified", np.zeros(len(self.columns["sample"]))) >= 0.5

    @property
    def tar(self) -> float:
        """The mean over texts of the share of their tokens accepted."""
        return float(self.by_text("acceptance").mean()) if len(self["sample"]) else 0.0

    def by_text(self, name: str) -> Column:
        """The mean of a column over the tokens of each text that has some."""
        sample = self["sample"]
        counts = np.bincount(sample)
        sums = np.bincount(sample, weights=self[name].astype(np.float64))
        return sums[counts > 0] / counts[counts > 0]


@dataclass(frozen=True)
class Looks:
    """A run's probe texts and the looks at them, in order of steps; at least one."""

    texts: list[Text]
    looks: list[Look]

    @property
    def first(self) -> Look:
        return self.looks[0]

    @property
    def last(self) -> Look:
        return self.looks[-1]

    @property
    def tokens(self) -> int:
        """Supervised tokens of a look."""
        return len(self.last["sample"])

    def same_texts(self, other: Looks) -> bool:
        """Whether both looked at the same tokens."""
        return all(
            np.array_equal(self.last[name], other.last[name]) for name in ("sample", "token", "label")
        ) and ([text.ids for text in self.texts] == [text.ids for text in other.texts])

    @property
    def offset(self) -> Column:
        """The place of each token among the supervised ones of its text, from 0."""
        sample = self.last["sample"]
        first = np.r_[True, sample[1:] != sample[:-1]] if len(sample) else np.zeros(0, bool)
        starts = np.maximum.accumulate(np.where(first, np.arange(len(sample)), 0))
        return np.arange(len(sample)) - starts


def read_looks(folder: Path, *, newest: bool = False) -> Looks | None:
    """The looks in a run's folder ``probe``; None where there are none, DataError where one is damaged.

    newest: the newest alone.
    """
    texts = folder / "texts.json"
    files = sorted(folder.glob("step-*.safetensors")) if folder.is_dir() else []
    files = files[-1:] if newest else files
    if not files or not texts.is_file():
        return None
    try:
        samples = [
            Text(str(one["stream"]), list(one["ids"]), list(map(str, one["tokens"])))
            for one in json.loads(texts.read_bytes())["samples"]
        ]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{texts} is damaged: {type(error).__name__}: {error}.") from error
    found = [_look(path, samples) for path in files]
    n = len(found[0]["sample"])
    return Looks(samples, [one for one in found if len(one["sample"]) == n])


def _look(path: Path, samples: Sequence[Text]) -> Look:
    try:
        with safe_open(path, "numpy") as file:
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            noted = json.loads(file.metadata()["look"])
        named = {int(one): str(text) for one, text in noted["pieces"].items()}
        look = Look(int(noted["step"]), int(noted["rows"]), columns, named)
        lengths = np.array([len(text.tokens) for text in samples], dtype=np.int64)
        whose, at = look["sample"], look["token"]
        if (
            not _whole(columns)
            or ((whose < 0) | (whose >= len(lengths))).any()
            or ((at < 0) | (at >= lengths[whose])).any()
        ):
            raise ValueError("its columns do not fit the texts")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{path} is damaged: {type(error).__name__}: {error}.") from error
    return look


def _whole(columns: dict[str, Column]) -> bool:
    """Whether the columns NEEDED are there, all are as long, and each is of its kind."""
    return (
        len({column.shape for column in columns.values()}) == 1
        and set(NEEDED) <= set(columns)
        and all(
            column.ndim == 1 and column.dtype.kind == ("i" if name in COUNTED else "f")
            for name, column in columns.items()
        )
        and all(np.isfinite(columns[name]).all() for name in ("acceptance", "weight"))
    )


def binned(values: Column, of: Column, edges: Sequence[float]) -> list[tuple[float, int, float]]:
    """(edge, n, mean of ``values``) of each bin [edge, next) of ``of``; the last is open, empty ones are left out.

    >>> binned(np.array([1.0, 0.0, 1.0]), np.array([0, 3, 9]), (0, 4, 64))
    [(0, 2, 0.5), (4, 1, 1.0)]
    """
    place = np.clip(np.digitize(of, edges) - 1, 0, len(edges) - 1)
    return [
        (edge, int((place == i).sum()), float(values[place == i].mean()))
        for i, edge in enumerate(edges)
        if (place == i).any()
    ]


def calibration(look: Look, who: str) -> tuple[float, list[tuple[float, int, float]]] | None:
    """Expected calibration error and (mean confidence, n, share right) of ten bins of the most probable token.

    who: student or teacher. Right is where its most probable token is the text's. None where the look does not say.
    Source: Naeini et al. 2015; Guo et al. 2017 (arXiv 1706.04599), equation 3.
    """
    token, sure = ("proposal", "q_proposal") if who == "student" else ("teacher_top", "p_teacher_top")
    if token not in look.columns or sure not in look.columns:
        return None
    known = (look[token] >= 0) & np.isfinite(look[sure])
    if not known.any():
        return None
    confidence, right = look[sure][known].astype(np.float64), (look[token] == look["label"])[known]
    place = np.minimum((confidence * CONFIDENCES).astype(int), CONFIDENCES - 1)
    bins = [
        (float(confidence[place == i].mean()), int((place == i).sum()), float(right[place == i].mean()))
        for i in range(CONFIDENCES)
        if (place == i).any()
    ]
    return sum(n * abs(sure - share) for sure, n, share in bins) / int(known.sum()), bins
