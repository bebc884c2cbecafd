"""What a draft is worth: acceptance by position, tokens a pass of the target, and speed, expected and measured.

g draft length; a pass is one forward call of the target. Times are of this machine, one sequence at a time.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from selectkd.evals.speculative.cached import CachedModel
from selectkd.evals.speculative.decode import Decoded, decode, decode_alone
from selectkd.evals.statistics import Interval, bootstrap_ratio
from selectkd.models.devices import wait_for

TIMED_PASSES = 5
"""Passes that the cost of one is the median of."""


@dataclass(frozen=True)
class Costs:
    """Seconds of one pass: the target on one token, the target on g + 1 tokens, the draft on one."""

    target: float
    target_on_draft: float
    draft: float

    @property
    def ratio(self) -> float:
        """c, the draft's pass over the target's."""
        return self.draft / self.target


@dataclass(frozen=True)
class Speculation:
    """One draft at one length, beside the target alone on the same prompts.

    acceptance: the share of checked draft tokens that stood (a token behind a rejected one is not checked), with
    its bootstrap over prompts; by_position: the same at each place of the draft. mean_accepted_length: tokens a pass,
    the target's own among them, from 1 to g + 1. speedup_expected: Leviathan et al., Theorem 3.8, from acceptance and
    cost ratio, as if checking g + 1 tokens cost the target what one does; speedup_from_costs: with what it really cost.
    same: whether the tokens are those of the target alone (temperature 0; above it, None: only the law is the same).
    """

    draft_length: int
    temperature: float
    acceptance: Interval
    by_position: list[float | None]
    mean_accepted_length: float
    costs: Costs
    speedup_expected: float
    speedup_from_costs: float
    speedup_measured: float
    tokens: int
    same: bool | None


@dataclass(frozen=True)
class Alone:
    """The target's own texts for some prompts, its seconds a token, and the settings of both.

    options: max_new_tokens, temperature and eos, as ``decode`` takes them. Prompt i is drawn with ``seed`` + i.
    """

    texts: list[Decoded]
    pace: float
    seed: int
    options: dict[str, Any]


def speculation(
    target: nn.Module, draft: nn.Module, prompts: Sequence[Tensor], *, draft_length: int, alone: Alone
) -> Speculation:
    """Measures one draft length with the settings of ``alone``, which ``timed_alone`` gave for the same prompts."""
    options, temperature = alone.options, alone.options["temperature"]
    decode(
        target, draft, prompts[0], draft_length=draft_length, max_new_tokens=2
    )  # what the first call alone costs
    started = _clock(prompts[0])
    seen = [
        decode(target, draft, prompt, draft_length=draft_length, seed=alone.seed + i, **options)
        for i, prompt in enumerate(prompts)
    ]
    pace = (_clock(prompts[0]) - started) / sum(len(one.tokens) for one in seen)
    rounds = [one for decoded in seen for one in decoded.rounds]
    costs = pass_costs(target, draft, prompts[0], draft_length=draft_length)
    accepted, checked = zip(*map(_accepted_and_checked, seen), strict=True)
    acceptance = bootstrap_ratio(accepted, checked)
    per_pass = sum(len(one.tokens) for one in seen) / len(rounds)  # none behind an end of sequence
    return Speculation(
        draft_length=draft_length,
        temperature=temperature,
        acceptance=acceptance,
        by_position=[_at(rounds, place) for place in range(draft_length)],
        mean_accepted_length=per_pass,
        costs=costs,
        speedup_expected=expected_speedup(acceptance.value, draft_length, costs.ratio),
        speedup_from_costs=per_pass * costs.target / (draft_length * costs.draft + costs.target_on_draft),
        speedup_measured=alone.pace / pace,
        tokens=sum(len(one.tokens) for one in seen),
        same=None if temperature else [one.tokens for one in alone.texts] == [one.tokens for one in seen],
    )


def timed_alone(
    target: nn.Module,
    prompts: Sequence[Tensor],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos: Collection[int] = (),
) -> Alone:
    """The target's own texts, and its seconds a token."""
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "eos": eos}
    decode_alone(target, prompts[0], max_new_tokens=2)  # what the first call alone costs
    started = _clock(prompts[0])
    texts = [decode_alone(target, prompt, seed=seed + i, **options) for i, prompt in enumerate(prompts)]
    pace = (_clock(prompts[0]) - started) / sum(len(one.tokens) for one in texts)
    return Alone(texts, pace, seed, options)


def expected_speedup(acceptance: float, draft_length: int, cost_ratio: float) -> float:
    """(1 - a^(g + 1)) / ((1 - a) (g c + 1)): tokens a pass over its cost, were each draft token accepted with chance a.

    g + 1 over g c + 1 at a = 1. Source: Leviathan et al. (arXiv 2211.17192), Theorem 3.8.

    >>> expected_speedup(1.0, 4, 0.0), expected_speedup(0.0, 4, 0.25)
    (5.0, 0.5)
    """
    per_pass = sum(acceptance**i for i in range(draft_length + 1))
    return per_pass / (draft_length * cost_ratio + 1)


def pass_costs(target: nn.Module, draft: nn.Module, prompt: Tensor, *, draft_length: int) -> Costs:
    """Median seconds of each kind of pass behind ``prompt``."""
    return Costs(
        target=_seconds(target, prompt, 1),
        target_on_draft=_seconds(target, prompt, draft_length + 1),
        draft=_seconds(draft, prompt, 1),
    )


def assisted(
    target: Any,
    draft: Any,
    prompts: Sequence[Tensor],
    *,
    draft_length: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    eos: Collection[int] = (),
) -> float:
    """How much faster transformers' own assisted generation is than its plain generation, on the same prompts.

    The draft length is held fixed: transformers would otherwise stop early where the draft is unsure.
    """
    sampled = (
        {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    )
    options = {
        "max_new_tokens": max_new_tokens,
        "eos_token_id": sorted(eos) or None,
        "pad_token_id": 0,
        **sampled,
    }
    settings, paces = draft.generation_config, []
    wanted = {
        "num_assistant_tokens": draft_length, "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }  # fmt: skip
    kept = {name: getattr(settings, name) for name in wanted}
    try:
        settings.update(**wanted)
        for helper in (None, draft):
            first, warm = prompts[0][None], {**options, "max_new_tokens": 2}
            with torch.random.fork_rng():
                target.generate(first, attention_mask=torch.ones_like(first), assistant_model=helper, **warm)
                torch.manual_seed(seed)
                started, written = _clock(prompts[0]), 0
                for prompt in prompts:
                    mask = torch.ones_like(prompt)[None]
                    out = target.generate(
                        prompt[None], attention_mask=mask, assistant_model=helper, **options
                    )
                    written += out.shape[1] - prompt.shape[0]
                paces.append((_clock(prompts[0]) - started) / written)
    finally:
        settings.update(**kept)
    return paces[0] / paces[1]


def _accepted_and_checked(seen: Decoded) -> tuple[int, int]:
    """(accepted, checked) draft tokens: those that stood, and with them the one that fell."""
    accepted = sum(one.accepted for one in seen.rounds)
    return accepted, accepted + sum(one.accepted < one.proposed for one in seen.rounds)


def _at(rounds: Sequence[Any], place: int) -> float | None:
    """The share of the draft tokens at ``place`` that stood, of those checked there; None where none was."""
    checked = [one for one in rounds if one.proposed > place and one.accepted >= place]
    return sum(one.accepted > place for one in checked) / len(checked) if checked else None


def _clock(like: Tensor) -> float:
    """Seconds, once the device of ``like`` has done what it was given."""
    wait_for(like.device)
    return time.perf_counter()


def _seconds(model: nn.Module, prompt: Tensor, tokens: int) -> float:
    """The median time of a pass over ``tokens`` tokens behind the prompt."""
    reader = CachedModel(model)
    ids = torch.cat([prompt, prompt[-1:].expand(tokens)])
    reader.logits(ids)
    taken = []
    for _ in range(TIMED_PASSES):
        reader.forget(prompt.shape[0])
        started = _clock(prompt)
        reader.logits(ids)
        taken.append(_clock(prompt) - started)
    return sorted(taken)[len(taken) // 2]
