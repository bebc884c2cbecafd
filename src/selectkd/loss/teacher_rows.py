"""The teacher's rows beside the student's, live or cached, and the chunks of them that are open at a time.

n rows, c rows of one chunk, v vocabulary, s support, d/e student/teacher width, K stored tokens.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.loss.head import Head, log_softmax
from selectkd.objective.pair import TokenPair, checked_ids, known_ids, topk_pair


class Scratch:
    """One [c, v] buffer for each model of a call, allocated at its first chunk and reused by the others."""

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}

    def of(
        self, owner: object, rows: int, width: int, like: Tensor, dtype: torch.dtype | None = None
    ) -> Float[Tensor, "b w"]:
        """``owner``'s buffer of at least ``rows`` rows, on the device of ``like`` and in its dtype or ``dtype``."""
        buffer = self.buffers.get(id(owner))
        if buffer is None or buffer.shape[0] < rows:
            buffer = torch.empty(rows, width, dtype=dtype or like.dtype, device=like.device)
            self.buffers[id(owner)] = buffer
        return buffer


@runtime_checkable
class TeacherChunk(Protocol):
    """One chunk of a teacher's rows, read once; ``block`` is within the chunk, b rows.

    Any kind can give the pair. What LiveChunk and CachedChunk have beyond it lets the loss do without autograd.
    """

    def pair(self, block: slice, logits: Float[Tensor, "b w"], temperature: float) -> TokenPair: ...


@runtime_checkable
class TeacherRows(Protocol):
    """A teacher's rows beside the student's: ``count`` of them. ``open`` reads one chunk of them, and may keep its
    logits in ``scratch``. ``reference``: a reference student's rows, for selectors that compare.

    ``shared_width`` says how many leading vocabulary rows the student's logits need. ``take``: some rows alone.
    """

    @property
    def count(self) -> int: ...

    @property
    def reference(self) -> TeacherRows | None: ...

    def shared_width(self, student_width: int) -> int: ...

    def take(self, index: Int[Tensor, " m"]) -> TeacherRows: ...

    def open(self, rows: slice, width: int, scratch: Scratch) -> TeacherChunk: ...


class LiveRows:
    """A teacher held in memory: hidden states [n, e] and its head [v, e]; exact for every divergence and verifier.

    The two heads may have different widths over the same ids: ids beyond the narrower one are unshared, and so
    is every id where ``shared`` [v] is False. Unshared ids get a logit of -inf on both sides before the softmax,
    so a padded or dead row of either head changes nothing. reference: the rows of a reference student over the same
    ids, for the selectors that compare with one (adaspec, rho_1).
    """

    def __init__(
        self,
        hidden: Float[Tensor, "n e"],
        head: Float[Tensor, "v e"] | Head,
        *,
        bias: Float[Tensor, " v"] | None = None,
        scale: float = 1.0,
        softcap: float | None = None,
        shared: Bool[Tensor, " v"] | None = None,
        reference: TeacherRows | None = None,
    ) -> None:
        plain = isinstance(head, Tensor)
        if not plain and (bias is not None or scale != 1.0 or softcap is not None):
            raise ConfigError(
                "LiveRows got a Head and bias, scale or softcap beside it; put them into the Head."
            )
        self.head = Head(head, bias, scale, softcap) if plain else head
        if hidden.ndim != 2 or hidden.shape[1] != self.head.inputs:
            raise ConfigError(
                f"the teacher's hidden states are {tuple(hidden.shape)} but its head is "
                f"{tuple(self.head.weight.shape)}; they must be [n, e] and [v, e]."
            )
        self.hidden = hidden.detach()
        self.shared = shared
        if reference is not None and reference.count != hidden.shape[0]:
            raise ConfigError(
                f"the reference student has {reference.count} rows and the teacher {hidden.shape[0]}; "
                "they must be the same."
            )
        self.reference = reference

    @property
    def count(self) -> int:
        return self.hidden.shape[0]

    def shared_width(self, student_width: int) -> int:
        return min(student_width, self.head.width)

    def take(self, index: Int[Tensor, " m"]) -> LiveRows:
        reference = None if self.reference is None else self.reference.take(index)
        return LiveRows(self.hidden[index], self.head, shared=self.shared, reference=reference)

    def open(self, rows: slice, width: int, scratch: Scratch) -> LiveChunk:
        hidden = self.hidden[rows]
        with torch.no_grad():
            out = scratch.of(self, hidden.shape[0], width, self.head.weight)
            raw = self.head.raw(hidden, width, out=out)  # [c, v]
        return LiveChunk(raw, self.head, None if self.shared is None else ~self.shared[:width])


class LiveChunk:
    """A chunk of a live teacher's logits, [c, v] as its head's product gave them."""

    def __init__(self, raw: Float[Tensor, "c w"], head: Head, unshared: Bool[Tensor, " w"] | None) -> None:
        self.raw, self.head, self.unshared = raw, head, unshared

    @torch.no_grad()
    def logits(self, block: slice) -> Float[Tensor, "b w"]:
        """The finished logits of a block, in memory the caller may overwrite."""
        return self.head.finish(self.raw[block])

    def pair(self, block: slice, logits: Float[Tensor, "b w"], temperature: float) -> TokenPair:
        """The pair of a block; unshared ids at -inf on both sides, rows that are not finite replaced and marked."""
        with torch.no_grad():
            teacher = self.head.finish(self.raw[block]).to(logits.dtype)
            if self.unshared is not None:
                teacher = teacher.masked_fill(self.unshared, -torch.inf)
            logp = log_softmax(teacher, temperature)
        if self.unshared is not None:
            logits = logits.masked_fill(self.unshared, -torch.inf)
        logq = log_softmax(logits, temperature)
        with torch.no_grad():
            # one entry that is nan or +inf makes the whole row of a log-softmax nan
            finite = ~logp[:, 0].isnan()
            logp = torch.where(finite[:, None], logp, logq)
            top = logits.argmax(-1)
        return TokenPair(logp=logp, logq=logq, student_top=top, finite=finite)


class CachedRows:
    """A teacher kept as its K best tokens: ids [n, K] and natural log-probabilities [n, K] at temperature 1.

    The rest of the mass is one tail outcome without a rank. Exact for greedy top-k with k <= K; KL-type values
    are lower bounds and the spec-k acceptance is an upper bound (data-processing inequality).

    shared [v]: which rows of the student's head stand for a token; the others have a probability of 0 on both sides,
    as of LiveRows. Stored ids among them give their mass to the rest in proportion; what they have beyond the K stored
    tokens is part of the tail.
    """

    def __init__(
        self,
        ids: Int[Tensor, "n k"],
        logp: Float[Tensor, "n k"],
        *,
        shared: Bool[Tensor, " v"] | None = None,
    ) -> None:
        if ids.shape != logp.shape or ids.ndim != 2:
            raise ConfigError(
                f"cached ids are {tuple(ids.shape)} and log-probs {tuple(logp.shape)}; both must be [n, K]."
            )
        self.ids, self.logp, self.shared = ids, logp.detach(), shared
        self.reference: TeacherRows | None = None  # its rows would have no place on a support of K tokens

    @property
    def count(self) -> int:
        return self.ids.shape[0]

    def shared_width(self, student_width: int) -> int:
        return student_width if self.shared is None else min(student_width, self.shared.shape[0])

    def take(self, index: Int[Tensor, " m"]) -> CachedRows:
        return CachedRows(self.ids[index], self.logp[index], shared=self.shared)

    def open(self, rows: slice, width: int, scratch: Scratch) -> CachedChunk:
        ids, logp = checked_ids(self.ids[rows], width), self.logp[rows]
        if ids.device.type != "cpu":
            ids, logp = known_ids(ids, logp, width)
        return CachedChunk(ids, logp, None if self.shared is None else ~self.shared[:width])


class CachedChunk:
    """A chunk of a cached teacher's K best tokens."""

    def __init__(
        self, ids: Int[Tensor, "c k"], logp: Float[Tensor, "c k"], unshared: Bool[Tensor, " w"] | None
    ) -> None:
        self.ids, self.unshared = ids, unshared
        self.logp = logp if unshared is None else _conditioned(logp, unshared[ids])

    def stored(self, block: slice, temperature: float) -> tuple[Int[Tensor, "b k"], Float[Tensor, "b k"]]:
        """Ids and log-probabilities of a block; a ConfigError at a temperature they were not stored at."""
        if temperature != 1.0:
            raise ConfigError(
                f"temperature = {temperature} with a top-K teacher: its tail cannot be computed at another "
                "temperature. "
                "Set temperature to 1.0, or use a live or hidden-state teacher."
            )
        return self.ids[block], self.logp[block]

    def pair(self, block: slice, logits: Float[Tensor, "b w"], temperature: float) -> TokenPair:
        """The pair of a block on its K tokens and the rest."""
        if self.unshared is not None:
            logits = logits.masked_fill(self.unshared, -torch.inf)
        return topk_pair(*self.stored(block, temperature), log_softmax(logits, 1.0))


def _conditioned(logp: Float[Tensor, "c k"], dead: Bool[Tensor, "c k"]) -> Float[Tensor, "c k"]:
    """Log-probabilities given that it is none of the ``dead`` ones."""
    mass = torch.where(dead, logp.double().exp(), 0.0).sum(-1, keepdim=True)  # [c, 1]
    return torch.where(dead, -torch.inf, logp - torch.log1p(-mass).to(logp.dtype))
