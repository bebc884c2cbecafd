"""Speculative decoding: the draft writes g tokens ahead, the target checks them all in one pass.

The text that comes out is distributed exactly as the target's own, whatever the draft: a bad draft costs time alone.
p = target (the teacher), q = draft (the student); g draft length, v vocabulary of the target.
Source: Leviathan, Kalman, Matias, Fast inference from transformers via speculative decoding, Algorithm 1 (arXiv
2211.17192).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from selectkd.errors import ConfigError
from selectkd.evals.speculative.cached import CachedModel


@dataclass(frozen=True)
class Round:
    """One pass of the target: how many draft tokens it judged, and how many of them it took."""

    proposed: int
    accepted: int


@dataclass(frozen=True)
class Decoded:
    """The new tokens, the end-of-sequence token with them, and the passes of the target that made them."""

    tokens: list[int]
    rounds: list[Round]


def decode(
    target: nn.Module,
    draft: nn.Module,
    prompt: Int[Tensor, " t"],
    *,
    draft_length: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos: Collection[int] = (),
) -> Decoded:
    """The target's continuation of ``prompt``, drafted ``draft_length`` tokens at a time.

    Temperature 0 is greedy: the tokens are those of the target alone. Above 0 they are drawn from the target's
    distribution at that temperature. Both models must give the same token the same id; their heads may differ in
    width. Stops after a token of ``eos``.
    """
    if draft_length < 1 or max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"draft_length = {draft_length}, max_new_tokens = {max_new_tokens}, temperature = {temperature}: "
            "give at least one token of each, and a temperature of 0 or more."
        )
    reader, writer = CachedModel(target), CachedModel(draft)
    uniform = uniforms(seed, prompt.device)
    ids = prompt
    rounds: list[Round] = []
    while (left := max_new_tokens - (ids.shape[0] - prompt.shape[0])) > 0:
        start, ahead, q = ids.shape[0], ids, []
        for _ in range(min(draft_length, left - 1)):  # the target's own token always follows
            q.append(distribution(writer.logits(ahead)[-1, : reader.width], temperature))
            token = inverse_cdf(q[-1], uniform(1)[0])
            ahead = torch.cat([ahead, token[None]])
            if int(token) in eos:
                break
        proposed = ahead[start:]
        logits = reader.logits(ahead)[-len(proposed) - 1 :]  # [g + 1, v]
        p = distribution(logits, temperature)
        accepted, token = verify(p, fitted(q, p), proposed, uniform(len(proposed) + 1))
        ids = torch.cat([ahead[: start + accepted], token[None]])
        rounds.append(Round(len(proposed), accepted))
        reader.forget(start + accepted)
        writer.forget(start + accepted)
        ended = [i for i in range(start, ids.shape[0]) if int(ids[i]) in eos]
        if ended:
            ids = ids[: ended[0] + 1]
            break
    return Decoded(ids[prompt.shape[0] :].tolist(), rounds)


def decode_alone(
    target: nn.Module,
    prompt: Int[Tensor, " t"],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos: Collection[int] = (),
) -> Decoded:
    """The same continuation, a token a pass: what ``decode`` must equal, and be faster than."""
    reader, uniform, ids = CachedModel(target), uniforms(seed, prompt.device), prompt
    rounds: list[Round] = []
    for _ in range(max_new_tokens):
        token = inverse_cdf(distribution(reader.logits(ids)[-1], temperature), uniform(1)[0])
        ids = torch.cat([ids, token[None]])
        rounds.append(Round(0, 0))
        if int(token) in eos:
            break
    return Decoded(ids[prompt.shape[0] :].tolist(), rounds)


def verify(
    p: Float[Tensor, "g1 v"],
    q: Float[Tensor, "g v"],
    proposed: Int[Tensor, " g"],
    uniform: Float[Tensor, " g1"],
) -> tuple[int, Int[Tensor, ""]]:
    """(how many proposed tokens stand, the token after them), g1 = g + 1.

    Token i stands where uniform[i] < p_i / q_i, as long as all before it do. The token after the last that stands is
    drawn from max(0, p - q), normalised, where one was rejected, and from p where none was; uniform[g] draws it. One
    step then has the law q min(1, p / q) + (1 - sum min(p, q)) max(0, p - q) / sum max(0, p - q) = p.

    >>> one_hot = torch.eye(3, dtype=torch.float64)
    >>> verify(one_hot[[0, 1]], one_hot[[0]], torch.tensor([0]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    (1, tensor(1))
    >>> verify(one_hot[[2, 1]], one_hot[[0]], torch.tensor([0]), torch.tensor([0.5, 0.5], dtype=torch.float64))
    (0, tensor(2))
    """
    g = proposed.shape[0]
    at = torch.arange(g, device=p.device)
    stands = uniform[:g] * q[at, proposed] < p[at, proposed]  # [g]
    accepted = int(stands.long().cumprod(0).sum())
    rest = p[accepted] if accepted == g else (p[accepted] - q[accepted]).clamp(min=0.0)
    return accepted, inverse_cdf(rest / rest.sum(), uniform[g])


def distribution(logits: Float[Tensor, "*n v"], temperature: float) -> Float[Tensor, "*n v"]:
    """softmax(logits / temperature); at temperature 0, its limit: all mass on the best token, the first of equals."""
    if temperature == 0.0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    return torch.softmax(logits / temperature, -1)


def inverse_cdf(p: Float[Tensor, " v"], uniform: Float[Tensor, ""]) -> Int[Tensor, ""]:
    """The token at which the running sum of p passes ``uniform`` in [0, 1): a draw from p, never of probability 0."""
    passed = p.cumsum(-1)
    return (passed > uniform * passed[-1]).long().argmax()


def fitted(q: list[Tensor], p: Float[Tensor, "g1 v"]) -> Float[Tensor, "g v"]:
    """The draft's distributions over the target's ids: those beyond a narrower head have probability 0."""
    if not q:
        return p[:0]
    drafted = torch.stack(q)  # [g, w], w <= v
    return torch.nn.functional.pad(drafted, (0, p.shape[-1] - drafted.shape[-1]))


def uniforms(seed: int, device: torch.device) -> Callable[[int], Float[Tensor, " n"]]:
    """A stream of numbers in [0, 1), fp64, the same on every device: call it with how many are wanted."""
    generator = torch.Generator().manual_seed(seed)
    return lambda n: torch.rand(n, generator=generator, dtype=torch.float64).to(device)
