"""Teacher and student log-probabilities side by side on one support.

n rows, s support columns, v vocabulary, K stored tokens. p = teacher, q = student, natural log.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from selectkd.errors import ConfigError


@dataclass(frozen=True)
class TokenPair:
    """The two distributions at each of n supervised positions, on the same s columns.

    logp, logq: [n, s], each row sums to 1 in probability; -inf marks an outcome that cannot happen.
    student_top: [n], the column of the student's argmax over its whole vocabulary; -1 where it lies in the tail.
    tail: whether the last column is many tokens together (it has mass, but no rank).
    ids: [n, s - tail], the token each column stands for; None where column = id.
    label: [n], the id of the token in the text; None where the caller gave no labels.
    sequence: [n], which sequence a row belongs to, rows of one sequence in order; None means one sequence.
    logr: [n, s], a reference student's log-probabilities, for the selectors that compare with one.
    finite: [n], False where the teacher's row was not finite (logp then repeats logq); None means all are.
    known_overlap: [n], sum_v min(p, q) where it is known already; ``overlap`` computes it otherwise.
    """

    logp: Float[Tensor, "n s"]
    logq: Float[Tensor, "n s"]
    student_top: Int[Tensor, " n"]
    tail: bool = False
    ids: Int[Tensor, "n k"] | None = None
    label: Int[Tensor, " n"] | None = None
    sequence: Int[Tensor, " n"] | None = None
    logr: Float[Tensor, "n s"] | None = None
    finite: Bool[Tensor, " n"] | None = None
    known_overlap: Float[Tensor, " n"] | None = None

    @property
    def ranked(self) -> Float[Tensor, "n k"]:
        """The teacher's log-probabilities of single tokens: logp without the tail, [n, s - tail]."""
        return self.logp[:, :-1] if self.tail else self.logp

    @property
    def overlap(self) -> Float[Tensor, " n"]:
        """sum_v min(p, q) = 1 - TV(p, q), in [0, 1]: how often speculative decoding accepts one draw of q."""
        if self.known_overlap is not None:
            return self.known_overlap
        return torch.minimum(self.logp, self.logq).exp().sum(-1).clamp(max=1.0)

    def column(self, token: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The column of each token id [n]; -1 where it is in the tail or outside the support."""
        width = self.ranked.shape[-1]
        if self.ids is None:
            return torch.where((token >= 0) & (token < width), token, -1)
        hit = self.ids == token[:, None]  # [n, K]
        return torch.where(hit.any(-1), hit.float().argmax(-1), -1)


def dense_pair(logp: Float[Tensor, "n v"], logq: Float[Tensor, "n w"]) -> TokenPair:
    """The pair of two full distributions [n, v]; widths may differ over the same ids.

    Ids beyond the narrower width are unshared: the wider side is conditioned on the shared ids (log-prob -inf
    outside them, the rest renormalised), which equals a logit of -inf before its softmax.

    >>> import torch
    >>> pair = dense_pair(torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log())
    >>> pair.student_top.tolist()
    [1]
    """
    if logp.ndim != 2 or logq.ndim != 2 or logp.shape[0] != logq.shape[0]:
        raise ConfigError(
            f"dense_pair needs [n, v] and [n, v], got {tuple(logp.shape)} and {tuple(logq.shape)}."
        )
    width = min(logp.shape[1], logq.shape[1])
    logp, logq = (x if x.shape[1] == width else torch.log_softmax(x[:, :width], -1) for x in (logp, logq))
    return TokenPair(logp=logp.detach(), logq=logq, student_top=logq.detach().argmax(-1))


def topk_pair(ids: Int[Tensor, "n k"], logp: Float[Tensor, "n k"], logq: Float[Tensor, "n v"]) -> TokenPair:
    """The pair on a teacher's K stored tokens plus one tail column, from ids [n, K], logp [n, K], logq [n, v].

    Both tails hold all the mass outside the K tokens, so nothing is renormalised: a student that moved its mass
    outside the K tokens is seen to have done so.

    >>> import torch
    >>> pair = topk_pair(torch.tensor([[2]]), torch.tensor([[0.5]]).log(), torch.tensor([[0.25, 0.5, 0.25]]).log())
    >>> pair.logp.exp().tolist(), pair.logq.exp().tolist(), pair.student_top.tolist()
    ([[0.5, 0.5]], [[0.25, 0.75]], [-1])
    """
    ids = checked_ids(ids, logq.shape[1])
    rest = logsumexp(logq.scatter(1, ids, -torch.inf))  # [n, 1]
    return support_pair(ids, logp, torch.cat([logq.gather(1, ids), rest], 1), logq.detach().argmax(-1))


def support_pair(
    ids: Int[Tensor, "n k"],
    logp: Float[Tensor, "n k"],
    logq: Float[Tensor, "n s"],
    student_top: Int[Tensor, " n"],
) -> TokenPair:
    """The pair from K stored tokens and the student on the same K tokens and their rest, logq [n, K + 1].

    student_top: the id of the student's argmax over its whole vocabulary.
    """
    finite = torch.isfinite(logp.clamp(min=-1e30)).all(
        -1
    )  # -inf is a probability of 0, nan and +inf are faults
    logp = torch.where(finite[:, None], logp.to(logq.dtype), logq[:, :-1].detach())
    rest = torch.log1p(-logp.double().exp().sum(-1, keepdim=True).clamp(max=1.0)).to(logq.dtype)  # [n, 1]
    hit = ids == student_top[:, None]
    return TokenPair(
        logp=torch.cat([logp, rest], 1).detach(),
        logq=logq,
        student_top=torch.where(hit.any(-1), hit.float().argmax(-1), -1),
        tail=True,
        ids=ids,
        finite=finite,
    )


def checked_ids(ids: Int[Tensor, "n k"], width: int) -> Int[Tensor, "n k"]:
    """The ids as int64, or a ConfigError where one is no token of a vocabulary of ``width``.

    On an accelerator a look would wait: there ``known_ids`` takes such rows out.
    """
    if ids.device.type == "cpu" and ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= width):
        raise ConfigError(
            f"the teacher's stored ids reach from {int(ids.min())} to {int(ids.max())}, but the student's "
            f"vocabulary has {width} tokens; teacher and student must share their ids."
        )
    return ids.long()


def known_ids(
    ids: Int[Tensor, "n k"], logp: Float[Tensor, "n k"], width: int
) -> tuple[Int[Tensor, "n k"], Float[Tensor, "n k"]]:
    """The ids as int64 and their log-probabilities, nan in a row with an id that is no token of ``width``: such a row
    counts as one of a teacher that is not finite.

    >>> import torch
    >>> known_ids(torch.tensor([[0, 1], [0, 9]]), torch.zeros(2, 2), 4)[1].tolist()
    [[0.0, 0.0], [nan, nan]]
    """
    outside = (ids < 0) | (ids >= width)
    return ids.long().masked_fill(outside, 0), logp.masked_fill(outside.any(-1, keepdim=True), torch.nan)


def logsumexp(x: Float[Tensor, "n s"]) -> Float[Tensor, "n 1"]:
    """logsumexp over the last axis, [n, 1], whose gradient is 0 (not nan) where every entry is -inf."""
    empty = torch.isneginf(x).all(-1, keepdim=True)
    total = torch.logsumexp(x.masked_fill(empty, 0.0), -1, keepdim=True)
    return total.masked_fill(empty, -torch.inf)


def entropy(log_a: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """Shannon entropy -sum a log a in nats, [n], in [0, log s]; an impossible outcome contributes 0."""
    return -(log_a.exp() * log_a.masked_fill(torch.isneginf(log_a), 0.0)).sum(-1)


def hellinger_distance(logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"]) -> Float[Tensor, " n"]:
    """H(p, q) = ||sqrt p - sqrt q|| / sqrt 2, [n], in [0, 1]."""
    return (0.5 * (torch.exp(0.5 * logp) - torch.exp(0.5 * logq)).square().sum(-1)).sqrt().clamp(max=1.0)


def label_of(pair: TokenPair, name: str) -> Int[Tensor, " n"]:
    """The labels of the rows, or a ConfigError that says who needs them."""
    if pair.label is None:
        raise ConfigError(f"{name} reads the tokens of the text; pass labels=[n] to distillation_loss.")
    return pair.label


def one_of(label: Int[Tensor, " n"], tokens: Sequence[int]) -> Bool[Tensor, " n"]:
    """Whether the text's token of each row is one of ``tokens``, [n]."""
    found = torch.zeros_like(label, dtype=torch.bool)
    for token in tokens:  # a tensor of them would be a copy that waits for the device
        found = found | (label == token)
    return found


def sequence_of(pair: TokenPair) -> Int[Tensor, " n"]:
    """Which sequence each row belongs to, [n]; one sequence where the pair names none."""
    if pair.sequence is not None:
        return pair.sequence
    return torch.zeros(pair.logp.shape[0], dtype=torch.long, device=pair.logp.device)


def label_log_prob(pair: TokenPair, log_a: Float[Tensor, "n s"], name: str) -> Float[Tensor, " n"]:
    """log a(y_t) of the text's token, [n]; the tail's mass where the token is in the tail, -inf where it is nowhere."""
    column = pair.column(label_of(pair, name))
    found = log_a.gather(-1, torch.where(column >= 0, column, log_a.shape[-1] - 1)[:, None])[:, 0]
    return found if pair.tail else torch.where(column >= 0, found, -math.inf)
