"""Generation: the same text as transformers where nothing is drawn, the right law where something is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.rollouts.few_rows import FewRows, is_narrow
from selectkd.rollouts.generate import Ends, Request, ends_of, generate
from selectkd.rollouts.kv_decoder import CachedDecoder, kv_decoder
from selectkd.rollouts.rules import Draw, Interleaved, Mixed
from selectkd.rollouts.sampling import Sampling, drawn
from training.tiny import VOCABULARY, tiny_llama, tiny_tokenizer

GREEDY = Draw(Sampling(temperature=0.0))
UNLIKELY = 1e-4
"""The tests draw from fixed seeds, so they pass or fail for good; a right program fails one in 10,000 seeds."""


@pytest.fixture(scope="module")
def teacher() -> Any:
    return tiny_llama(1, layers=3, hidden=48)


@pytest.fixture(scope="module")
def student() -> Any:
    return tiny_llama(2)


def prompts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCABULARY, (size,), generator=generator).tolist() for size in lengths]


def requests(limit: int = 20) -> list[Request]:
    return [Request(prompt, limit) for prompt in prompts(3, 9, 5, 7, 4, 6)]


@pytest.mark.parametrize("batch_tokens", [8192, 40])
def test_greedy_text_is_that_of_transformers_token_by_token(teacher: Any, batch_tokens: int) -> None:
    ours = generate([teacher], requests(), GREEDY, ends={2, 9}, width=VOCABULARY, batch_tokens=batch_tokens)
    lengths = set()
    for request, text in zip(requests(), ours, strict=True):
        ids = torch.tensor([list(request.prompt)])
        whole = teacher.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=[2, 9], pad_token_id=0)
        assert text.ids == whole[0, ids.shape[1] :].tolist()
        assert text.ended == (text.ids[-1] in (2, 9))
        lengths.add(len(text.ids))
    assert len(lengths) > 1  # some rows left the batch before the others


def test_the_product_of_few_rows_is_that_of_many_either_way_round() -> None:
    """Rows and weights of the size that is turned round, within the rounding of a sum of 700 products; others are
    untouched to the bit.
    """
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(1000, 700, generator=generator), torch.randn(1000, generator=generator)
    for rows, turned in ((4, False), (8, True), (24, True), (40, False)):
        x = torch.randn(rows, 1, 700, generator=generator)
        assert (
            is_narrow(x, weight) == turned
            and not is_narrow(x, weight[:500])
            and not is_narrow(x.double(), weight)
        )
        with FewRows():
            seen, without = torch.nn.functional.linear(x, weight, bias), torch.nn.functional.linear(x, weight)
        exact = x.double() @ weight.double().t()
        bound = 700 * torch.finfo(torch.float32).eps * (x.abs() @ weight.abs().t())
        assert seen.shape == (rows, 1, 1000) and bool(((seen - exact - bias).abs() <= bound + 1e-6).all())
        assert bool(((without - exact).abs() <= bound).all())
        if not turned:
            assert torch.equal(seen, torch.nn.functional.linear(x, weight, bias))


def test_a_text_depends_neither_on_its_neighbours_nor_on_their_order(teacher: Any) -> None:
    rule = Draw(Sampling(temperature=0.9, top_p=0.95))
    together = generate([teacher], requests(), rule, ends={2}, width=VOCABULARY, seed=3, step=7)
    backwards = generate([teacher], requests()[::-1], rule, ends={2}, width=VOCABULARY, seed=3, step=7)
    alone = [
        generate([teacher], [one], rule, ends={2}, width=VOCABULARY, seed=3, step=7)[0] for one in requests()
    ]
    assert together == alone == backwards[::-1]
    assert together != generate([teacher], requests(), rule, ends={2}, width=VOCABULARY, seed=3, step=8)
    copies = [Request(requests()[0].prompt, 20, copy=copy) for copy in (0, 1)]
    first, second = generate([teacher], copies, rule, ends={2}, width=VOCABULARY, seed=3, step=7)
    assert first == together[0] and first != second


def test_a_text_ends_at_its_own_limit_and_at_a_stop_string(teacher: Any) -> None:
    asked = [Request(prompt, limit) for prompt, limit in zip(prompts(4, 4, 4), (0, 3, 12), strict=True)]
    free = generate([teacher], asked, GREEDY, ends=(), width=VOCABULARY)
    assert [len(text.ids) for text in free] == [0, 3, 12] and not any(text.ended for text in free)
    tokenizer = tiny_tokenizer()
    word = tokenizer.decode(free[2].ids[4:6])
    stopped = generate([teacher], asked, GREEDY, ends=Ends((), [word], tokenizer.decode), width=VOCABULARY)
    assert stopped[2].ended and stopped[2].ids == free[2].ids[:6]


def test_rows_of_a_head_that_stand_for_no_token_are_never_written(teacher: Any) -> None:
    texts = generate([teacher], requests(), Draw(), ends={2}, width=20, seed=1)
    assert max(token for text in texts for token in text.ids) < 20


def test_the_models_keep_their_mode_and_end_sets_are_joined(student: Any) -> None:
    student.train()
    generate([student], requests(2), GREEDY, ends={2}, width=VOCABULARY)
    assert student.training
    student.generation_config.eos_token_id = [2, 5]
    assert ends_of(tiny_tokenizer(), student) == {2, 5}
    student.generation_config.eos_token_id = 2


@pytest.mark.parametrize("rule", [Interleaved(), GREEDY])
def test_a_rule_with_the_wrong_number_of_models_is_refused(rule: Any, teacher: Any) -> None:
    with pytest.raises(ConfigError, match="models"):
        generate([teacher] * (3 - rule.models), requests(), rule, ends={2}, width=VOCABULARY)


def fits(tokens: Tensor, p: Tensor) -> None:
    """Whether the counts of drawn tokens go with a law p [v], by chi-square."""
    counts = torch.bincount(tokens, minlength=p.shape[0]).double()
    assert float(counts[p == 0].sum()) == 0
    kept = p > 0
    expected = p[kept].double() / p[kept].double().sum() * counts.sum()
    assert chisquare(counts[kept].numpy(), expected.numpy()).pvalue > UNLIKELY


def logits_of(seed: int, v: int = 12) -> Tensor:
    return torch.randn(v, generator=torch.Generator().manual_seed(seed)) * 1.5


def many(n: int, r: int, seed: int = 0) -> Tensor:
    return torch.rand(n, r, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(), Sampling(0.7), Sampling(1.3, top_k=4), Sampling(1.0, top_p=0.8), Sampling(0.8, 0.95, 9)],
    ids=str,
)
def test_draws_have_the_law_of_transformers_own_warpers(sampling: Sampling) -> None:
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = logits_of(3)[None]
    warped = TemperatureLogitsWarper(float(sampling.temperature))(None, logits)  # type: ignore[arg-type]
    if sampling.top_k is not None:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)  # type: ignore[arg-type]
    if sampling.top_p < 1:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)  # type: ignore[arg-type]
    law = warped.softmax(-1)[0]
    ours = sampling.probabilities(logits)[0]
    torch.testing.assert_close(ours, law, rtol=1e-5, atol=1e-7)  # fp32 rounding
    fits(drawn(ours.expand(20_000, -1), many(20_000, 1)[:, 0]), law)


def write(rule: Any, logits: Sequence[Tensor], n: int = 20_000) -> tuple[Tensor, Tensor]:
    return rule([one.expand(n, -1) for one in logits], many(n, rule.uniforms))


def test_skd_replaces_every_token_outside_the_teachers_window_by_a_draw_of_the_teachers() -> None:
    student, teacher, window = logits_of(1), logits_of(2), 4
    token, replaced = write(Interleaved(window=window), [student, teacher])
    inside = torch.zeros(12, dtype=torch.bool)
    inside[teacher.topk(window).indices] = True
    assert inside[token[~replaced]].all()
    q, p = student.softmax(-1), teacher.softmax(-1)
    share = float(replaced.double().mean())
    outside = float(q[~inside].sum())
    assert abs(share - outside) < 4 * (outside * (1 - outside) / 20_000) ** 0.5  # 4 sigma of 20,000 draws
    fits(token[replaced], p)
    fits(token[~replaced], torch.where(inside, q, 0.0))


def test_skd_with_the_teacher_as_student_replaces_nothing(teacher: Any) -> None:
    for sampling in (Sampling(0.0), Sampling(1.0, top_k=25)):
        texts = generate(
            [teacher, teacher], requests(), Interleaved(sampling, window=25), ends={2}, width=VOCABULARY
        )
        assert sum(text.replaced for text in texts) == 0
        alone = generate([teacher], requests(), Draw(sampling), ends={2}, width=VOCABULARY)
        assert sampling.temperature > 0 or [text.ids for text in texts] == [text.ids for text in alone]


def test_skd_of_two_models_counts_what_it_replaced(student: Any, teacher: Any) -> None:
    rule = Interleaved(Sampling(0.0), window=1)  # then every token is the teacher's best
    texts = generate([student, teacher], requests(), rule, ends={2}, width=VOCABULARY)
    alone = generate([teacher], requests(), GREEDY, ends={2}, width=VOCABULARY)
    assert [text.ids for text in texts] == [text.ids for text in alone]
    assert sum(text.replaced for text in texts) > 0


def test_minillm_draws_from_the_mixture() -> None:
    student, teacher = logits_of(1), logits_of(2)
    token, replaced = write(Mixed(share=0.2), [student, teacher])
    fits(token, 0.2 * teacher.softmax(-1) + 0.8 * student.softmax(-1))
    assert not replaced.any()


def test_a_cache_under_autocast_is_held_to_the_digits_of_bf16() -> None:
    """fp32 weights whose products are bf16 give a row other digits in a batch; in fp32 as many would be a fault."""
    model = tiny_llama(7)
    model.model.norm.register_forward_hook(lambda _, __, out: out * (1.0 + 2e-3 * (out.shape[0] > 1)))
    given = {"width": VOCABULARY}
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(kv_decoder(model, prompts(3, 5), **given), CachedDecoder)
    other = tiny_llama(7)
    other.model.norm.register_forward_hook(lambda _, __, out: out * (1.0 + 2e-3 * (out.shape[0] > 1)))
    with pytest.raises(ConfigError, match="different logits for a text beside a longer one"):
        kv_decoder(other, prompts(3, 5), **given)
