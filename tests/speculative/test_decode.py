"""Draft-and-verify changes nothing but the time: token for token when greedy, in distribution when sampled."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from selectkd.errors import ConfigError
from selectkd.evals.speculative.cached import CachedModel
from selectkd.evals.speculative.decode import Round, decode, decode_alone, distribution, inverse_cdf, verify


def tiny(seed: int, *, width: int = 40, layers: int = 2, kind: Any = None, **more: Any) -> Any:
    """A random model in fp64, so that a cache and a batch of tokens change no rounding that matters."""
    config_of, model_of = kind or (LlamaConfig, LlamaForCausalLM)
    config = config_of(
        vocab_size=width, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.4, bos_token_id=None, eos_token_id=None, pad_token_id=None, **more,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_of(config).double().eval()


def near(model: Any, seed: int, amount: float) -> Any:
    """A draft that agrees with its target some of the time: the target's weights and noise."""
    import copy

    made = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight += (
                amount * weight.std() * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
            )
    return made


def from_transformers(model: Any, prompt: Tensor, new: int, eos: int | None = None) -> list[int]:
    out = model.generate(
        prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=new, do_sample=False,
        eos_token_id=eos, pad_token_id=0,
    )  # fmt: skip
    return out[0, prompt.shape[0] :].tolist()


PROMPT = torch.tensor([3, 1, 4, 1, 5])


@pytest.mark.parametrize("g", [1, 2, 5, 9])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_greedy_is_token_for_token_the_target_alone(g: int, seed: int) -> None:
    target = tiny(seed)
    alone = decode_alone(target, PROMPT, max_new_tokens=30).tokens
    assert alone == from_transformers(target, PROMPT, 30)
    drafts = {"close": near(target, 7, 0.05), "foreign": tiny(seed + 10, layers=1)}
    for draft in drafts.values():
        seen = decode(target, draft, PROMPT, draft_length=g, max_new_tokens=30)
        assert seen.tokens == alone
        assert sum(one.accepted + 1 for one in seen.rounds) == 30
    close = decode(target, drafts["close"], PROMPT, draft_length=g, max_new_tokens=30)
    assert any(one.accepted < one.proposed for one in close.rounds) or g == 1
    assert any(one.accepted > 0 for one in close.rounds)


def test_the_drafts_cache_is_rolled_back_too() -> None:
    target = tiny(0)
    draft = near(target, 7, 0.05)
    alone = PROMPT.tolist() + decode_alone(target, PROMPT, max_new_tokens=30).tokens
    expected, at = [], len(PROMPT)
    while at < len(alone):  # the same rounds without any cache: how far the draft's own greedy text agrees
        ahead = alone[:at]
        for _ in range(min(4, len(alone) - at - 1)):
            ahead.append(int(draft(torch.tensor([ahead])).logits[0, -1].argmax()))
        proposed = ahead[at:]
        stand = [a == b for a, b in zip(proposed, alone[at:], strict=False)]
        accepted = stand.index(False) if False in stand else len(stand)
        expected.append(Round(len(proposed), accepted))
        at += accepted + 1
    seen = decode(target, draft, PROMPT, draft_length=4, max_new_tokens=30)
    assert seen.rounds == expected and any(one.accepted < one.proposed for one in expected)


def test_a_draft_equal_to_its_target_is_always_accepted() -> None:
    target = tiny(3)
    for temperature in (0.0, 0.7, 1.0):
        seen = decode(
            target, target, PROMPT, draft_length=4, max_new_tokens=25, temperature=temperature, seed=5
        )
        assert all(one.accepted == one.proposed for one in seen.rounds)
        assert seen.rounds == [Round(4, 4)] * 5


def test_sampled_tokens_follow_the_targets_distribution() -> None:
    target, draft = tiny(0, width=6, layers=1), tiny(1, width=6, layers=1)
    prompt, temperature, trials = torch.tensor([2, 4]), 1.0, 900
    with torch.no_grad():
        first = torch.softmax(target(prompt[None]).logits[0, -1], -1)  # [6]
        after = torch.stack([torch.tensor([2, 4, token]) for token in range(6)])
        second = torch.softmax(target(after).logits[:, -1], -1)  # [6, 6]
        third = torch.softmax(
            target(torch.tensor([[2, 4, a, b] for a in range(6) for b in range(6)])).logits[:, -1], -1
        )
    joint = first[:, None] * second
    last = (joint.reshape(-1, 1) * third).sum(0)
    seen = [
        decode(target, draft, prompt, draft_length=3, max_new_tokens=3, temperature=temperature, seed=seed)
        for seed in range(trials)
    ]
    rounds = [one for decoded in seen for one in decoded.rounds]
    assert 0.1 < sum(one.accepted for one in rounds) / sum(one.proposed for one in rounds) < 0.9
    counts = Counter(tuple(decoded.tokens[:2]) for decoded in seen)
    observed = [counts[(a, b)] for a in range(6) for b in range(6)]
    expected = (trials * joint).reshape(-1).tolist()
    assert (
        pooled_p(observed, expected) > 1e-4
    )  # the seeds are fixed: this is one draw of p, not a rate of failure
    thirds = Counter(decoded.tokens[2] for decoded in seen)
    assert pooled_p([thirds[a] for a in range(6)], (trials * last).tolist()) > 1e-4
    # the same test sees a draft that is believed without being checked
    drafted = Counter(
        decode_alone(draft, prompt, max_new_tokens=1, temperature=1.0, seed=seed).tokens[0]
        for seed in range(trials)
    )
    assert pooled_p([drafted[a] for a in range(6)], (trials * first).tolist()) < 1e-12


def pooled_p(observed: list[int], expected: list[float]) -> float:
    """Pearson's chi-square, cells with fewer than 5 expected taken together."""
    cells = sorted(zip(expected, observed, strict=True))
    small = [cell for cell in cells if cell[0] < 5]
    large = [cell for cell in cells if cell[0] >= 5]
    if small:
        large.append((sum(e for e, _ in small), sum(o for _, o in small)))
    e, o = zip(*large, strict=True)
    scale = sum(o) / sum(e)
    return float(stats.chisquare(o, [one * scale for one in e]).pvalue)


@given(st.integers(0, 10_000))
@settings(derandomize=True, deadline=None, max_examples=12)
def test_one_verified_step_has_exactly_the_targets_law(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.softmax(3 * torch.randn(2, 5, generator=generator, dtype=torch.float64), -1)
    law = torch.zeros(5, dtype=torch.float64)
    grid = (torch.arange(80, dtype=torch.float64) + 0.5) / 80
    for y in range(5):  # each proposed token by its probability; then where it falls, each other by its own
        seen = [
            verify(torch.stack([p, p]), q[None], torch.tensor([y]), torch.stack([u, grid[0]])) for u in grid
        ]
        stands = sum(accepted for accepted, _ in seen) / 80
        law[y] += q[y] * stands
        if stands < 1:
            for w in grid:
                fell, after = verify(
                    torch.stack([p, p]), q[None], torch.tensor([y]), torch.stack([grid[-1], w])
                )
                law[after] += q[y] * (1 - stands) / 80 * (fell == 0)
    # a grid of 80 is off by half a cell where a token stands or falls, and by one cell where the rest is drawn
    torch.testing.assert_close(law, p, rtol=0, atol=1.5 / 80)


def test_the_rest_is_drawn_from_what_the_draft_gives_too_little() -> None:
    p, q = torch.tensor([0.1, 0.6, 0.3]).double(), torch.tensor([0.7, 0.2, 0.1]).double()
    for u, expected in (
        (0.0, 1),
        (0.6, 1),
        (0.7, 2),
        (0.999, 2),
    ):  # max(0, p - q) = (0, .4, .2), so 2/3 and 1/3
        assert verify(torch.stack([p, p]), q[None], torch.tensor([0]), torch.tensor([0.99, u]).double()) == (
            0,
            expected,
        )


def test_the_models_end_of_sequence_ends_it() -> None:
    target = tiny(0)
    alone = decode_alone(target, PROMPT, max_new_tokens=30).tokens
    eos = alone[7]
    expected = alone[: alone.index(eos) + 1]
    for g in (1, 3, 10):
        for draft in (target, near(target, 7, 0.05)):
            seen = decode(target, draft, PROMPT, draft_length=g, max_new_tokens=30, eos={eos})
            assert seen.tokens == expected
    assert decode_alone(target, PROMPT, max_new_tokens=30, eos={eos}).tokens == expected


@pytest.mark.parametrize(("target_width", "draft_width"), [(40, 48), (48, 40)])
def test_heads_of_another_width_are_exact(target_width: int, draft_width: int) -> None:
    target, draft = tiny(0, width=target_width), tiny(0, width=draft_width)
    for temperature in (0.0, 1.0):
        seen = decode(target, draft, PROMPT, draft_length=4, max_new_tokens=20, temperature=temperature)
        assert max(seen.tokens) < target_width
    assert decode(target, draft, PROMPT, draft_length=4, max_new_tokens=20).tokens == from_transformers(
        target, PROMPT, 20
    )


def test_a_sliding_window_rolls_back() -> None:
    kind = (MistralConfig, MistralForCausalLM)
    target = tiny(0, kind=kind, sliding_window=6)
    seen = decode(target, near(target, 1, 0.05), PROMPT, draft_length=4, max_new_tokens=30)
    assert seen.tokens == from_transformers(target, PROMPT, 30)
    assert any(one.accepted < one.proposed for one in seen.rounds)


def test_a_rolled_back_cache_gives_the_logits_of_a_fresh_one() -> None:
    model = CachedModel(tiny(0))
    long, other = torch.tensor([1, 2, 3, 4, 5]), torch.tensor([1, 2, 9, 8])
    model.logits(long)
    model.forget(2)
    assert model.read == 2
    torch.testing.assert_close(
        model.logits(other)[-1], CachedModel(model.model).logits(other)[-1], rtol=1e-9, atol=1e-9
    )


def test_what_cannot_work_is_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(ConfigError, match="rolled back"):
        CachedModel(model)
    with pytest.raises(ConfigError, match="draft_length = 0"):
        decode(model, model, PROMPT, draft_length=0, max_new_tokens=3)


def test_temperature_zero_is_the_limit_of_small_ones() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -1.0, 0.5]]).double()
    torch.testing.assert_close(distribution(logits, 0.0), distribution(logits, 1e-3))
    assert distribution(torch.zeros(3), 0.0).tolist() == [1.0, 0.0, 0.0]


def test_a_token_of_probability_zero_is_never_drawn() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).double()
    for u in (0.0, 0.25, 0.5, 0.75, 0.9999999):
        assert int(inverse_cdf(p, torch.tensor(u, dtype=torch.float64))) in (1, 3)
