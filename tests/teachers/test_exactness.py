"""Every verdict on a payload is checked by numbers; table, page and refusals read from one place."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selectkd import Objective
from selectkd.cli import main
from selectkd.errors import ConfigError
from selectkd.objective.contract import example_log_dists
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.divergences.from_top_k import from_top_k
from selectkd.objective.pair import dense_pair, topk_pair
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS, traits_of
from selectkd.teachers.exactness import check, of_verifier, page, table

ROOT = Path(__file__).parents[2]
V = 300


def worlds() -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, logp, logq) in fp64: flat, peaked as language is (a power law over ranks), and the contract's own."""
    generator = torch.Generator().manual_seed(0)

    def normal() -> torch.Tensor:
        return torch.randn(200, V, generator=generator, dtype=torch.float64)

    ranks = -torch.log(torch.arange(1, V + 1, dtype=torch.float64))
    order = torch.stack([torch.randperm(V, generator=generator) for _ in range(200)])
    zipf = 2.0 * ranks[order]
    made = [
        ("flat", 0.3 * normal(), 0.3 * normal()),
        ("peaked", zipf + 0.3 * normal(), zipf + 1.5 * normal()),
    ]
    made.append(("apart", zipf, zipf.flip(0)))
    rows = [(name, torch.log_softmax(p, -1), torch.log_softmax(q, -1)) for name, p, q in made]
    return [*rows, ("contract", example_log_dists(60, 40, seed=1), example_log_dists(60, 40, seed=2))]


def from_k(logp: torch.Tensor, logq: torch.Tensor, k: int):
    best = logp.topk(k, -1)
    return topk_pair(best.indices, best.values, logq)


DECLARED = [(name, {}) for name in DIVERGENCES] + [
    ("jeffreys", {"weight": 0.0}),
    # not alpha .3: the tail's mass is 1 minus a sum, right to 2^-53, and the power .3 makes 1e-5 of that
    ("alpha_beta", {"alpha": 0.7, "beta": 0.3}),
    ("alpha_beta", {"alpha": 1.0, "beta": 0.0}),
    ("taid", {"t": 1.0}),
    ("skew_kl", {"alpha": 0.4}),
    ("generalized_jsd", {"beta": 0.1}),
]


BOUNDS = [
    one
    for one in DECLARED
    if from_top_k(functools.partial(DIVERGENCES[one[0]], **one[1])).verdict != "refused"
]


@pytest.mark.parametrize(("name", "params"), BOUNDS)
@pytest.mark.parametrize("k", [1, 8, 32])
def test_a_divergence_declared_a_lower_bound_is_one_on_every_row(name, params, k):
    divergence = functools.partial(DIVERGENCES[name], **params)
    assert from_top_k(divergence).verdict == "lower bound"
    for world, logp, logq in worlds():
        pair = from_k(logp, logq, k)
        above = divergence(pair.logp, pair.logq) - divergence(logp, logq)
        assert above.max() <= 1e-9, world


@pytest.mark.parametrize("name", ["adaptive_kl", "taid"])
def test_a_divergence_said_to_have_no_direction_goes_both_ways(name):
    assert "bounds nothing" in from_top_k(DIVERGENCES[name]).reason
    generator = torch.Generator().manual_seed(1)
    seen = torch.zeros(2, dtype=torch.bool)
    for scale in (0.1, 0.5, 1.0, 3.0):
        logp, logq = (
            torch.log_softmax(scale * torch.randn(4000, 6, generator=generator, dtype=torch.float64), -1)
            for _ in range(2)
        )
        pair = from_k(logp, logq, 2)
        gap = DIVERGENCES[name](pair.logp, pair.logq) - DIVERGENCES[name](logp, logq)
        seen |= torch.stack([(gap > 1e-6).any(), (gap < -1e-6).any()])
    assert bool(seen.all())


@pytest.mark.parametrize("name", VERIFIERS)
@pytest.mark.parametrize("k", [8, 32])
def test_a_verifier_is_what_it_declares_on_every_row(name, k):
    verifier = VERIFIERS[name]()
    verdict = of_verifier(verifier, "top_k", k=k).verdict
    if verdict == "refused":
        assert name in (
            "sigmoid_entropy_gap",
            "iw_opd",
            "fire",
        )  # weights from numbers that K tokens do not give
        return
    for world, logp, logq in worlds():
        edge = logp.topk(k + 1, -1).values[:, -2:]  # a tie across the edge of the K tokens cannot be seen
        logp, logq = logp[edge[:, 0] > edge[:, 1]], logq[edge[:, 0] > edge[:, 1]]
        uniform = torch.rand(
            logp.shape[0], traits_of(verifier).uniforms_per_token, generator=torch.Generator().manual_seed(3)
        )
        label = torch.arange(logp.shape[0]) % logp.shape[1]
        pairs = [dense_pair(logp, logq), from_k(logp, logq, k)]
        if name == "spec_k_literal":  # its law, since its draws land on other columns once the tail is merged
            live, stored = (1.0 - (1.0 - pair.overlap) ** verifier.k for pair in pairs)
        else:
            live, stored = (verifier(replace(pair, label=label), uniform) for pair in pairs)
        gap = (stored - live).double()
        if verdict == "exact":
            assert torch.equal(stored, live), world
        elif verdict == "upper bound":
            assert gap.min() >= -1e-9, world
        else:
            assert verdict == "lower bound" and gap.max() <= 1e-9, world


@pytest.mark.parametrize("verifier", ["greedy_topk", "label_top_k", "prefix_gate", "matched_shuffle"])
def test_fewer_stored_tokens_than_the_verifier_needs_are_refused_with_both_numbers(verifier):
    objective = Objective("forward_kl", {"name": verifier, "k": 20})
    with pytest.raises(ConfigError, match="20 best tokens, and there are 16"):
        check(objective, "top_k", k=16)
    check(objective, "top_k", k=20)
    check(objective, "hidden")


@pytest.mark.parametrize("name", VERIFIERS)
def test_a_verifier_that_compares_distributions_is_refused_a_single_best_token(name):
    objective = Objective("forward_kl", {"name": name})
    verdict = of_verifier(VERIFIERS[name](), "top_k", k=2).verdict
    if "bound" in verdict:
        with pytest.raises(ConfigError, match=r"gives its 1 best tokens, and it compares.*Use greedy_topk"):
            check(objective, "top_k", k=1)
        check(objective, "top_k", k=2)
    if name.startswith("spec_k"):
        assert verdict == "upper bound"


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys", "todi", "taid", "adaptive_kl"])
def test_what_a_top_k_teacher_cannot_give_is_refused_and_says_what_would_work(divergence):
    objective = Objective(divergence)
    with pytest.raises(ConfigError, match=r"objective.divergence = " + divergence) as told:
        check(objective, "top_k", k=32, source="cache/x")
    assert "cache/x gives its 32 best tokens" in str(told.value) and "forward_kl" in str(told.value)
    check(objective, "live")
    check(objective, "hidden")


@pytest.mark.parametrize("name", SELECTORS)
def test_a_selector_that_ranks_the_batch_is_refused_from_top_k(name):
    with pytest.raises(ConfigError, match="ranks the rows of a batch"):
        check(Objective("forward_kl", name), "top_k", k=32)


def test_a_component_from_outside_that_declares_nothing_is_refused_from_top_k_alone():
    objective = Objective(lambda logp, logq: (logp.exp() - logq.exp()).square().sum(-1), "always")
    check(objective, "live")
    with pytest.raises(ConfigError, match="from_top_k"):
        check(objective, "top_k", k=32)


@pytest.mark.parametrize("key", ["temperature", "verify_temperature"])
def test_a_top_k_teacher_cannot_be_re_tempered(key):
    objective = Objective("forward_kl", verify_temperature=2.0 if key == "verify_temperature" else 1.0)
    with pytest.raises(ConfigError, match=f"objective.{key} = 2.0"):
        check(objective, "top_k", k=32, temperature=2.0 if key == "temperature" else 1.0)


def test_every_component_has_a_verdict_and_a_reason_for_every_payload():
    rows = table()
    assert len(rows) == 5 * (len(DIVERGENCES) + len(VERIFIERS) + len(SELECTORS))
    assert all(row["reason"] for row in rows)
    assert all(row["verdict"] == "exact" for row in rows if row["payload"] in ("live", "hidden"))
    assert {row["verdict"] for row in rows} == {"exact", "lower bound", "upper bound", "unbiased", "refused"}


def test_drawn_ids_serve_forward_kl_on_every_row_and_nothing_else():
    good = {(row["name"], row["verdict"]) for row in table() if row["payload"] == "sampled"}
    assert {name for name, verdict in good if verdict != "refused"} == {"forward_kl", "always"}
    for objective in (Objective("reverse_kl", "always"), Objective("forward_kl", "greedy_topk")):
        with pytest.raises(ConfigError, match="drawn ids"):
            check(objective, "sampled", k=32)
    check(Objective("forward_kl", "always"), "sampled", k=32)


def test_what_the_table_refuses_across_tokenizers_is_refused():
    for row in table():
        if row["payload"] != "aligned" or row["kind"] == "selector":
            continue
        parts = (row["name"], "always") if row["kind"] == "divergence" else ("forward_kl", row["name"])
        if row["verdict"] == "refused":
            with pytest.raises(ConfigError, match="another tokenizer"):
                check(Objective(*parts), "aligned", source="x")
        else:
            check(Objective(*parts), "aligned", source="x")
    with pytest.raises(ConfigError, match="product of its tokens"):
        check(Objective("forward_kl", "always"), "aligned", temperature=2.0)


def test_the_page_in_the_docs_is_the_one_the_code_writes():
    assert (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8") == page()


def test_show_teachers_prints_the_table(capsys):
    assert main(["show", "teachers", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["teachers"] == table()
    assert main(["show", "teachers", "reverse_kl"]) == 0
    assert "top_k refused" in capsys.readouterr().out
    assert main(["show", "teachers", "--markdown"]) == 0
    assert capsys.readouterr().out == page()
    assert main(["show", "teachers", "reverse_lk"]) == 2
    assert main(["show", "divergences", "--markdown"]) == 2
