"""A divergence and a verifier from outside the package work by name, with no file of the package touched."""

from __future__ import annotations

import sys
import textwrap
from functools import partial

import pytest
import torch

from selectkd import LiveRows, Objective, allow_plugin, distillation_loss
from selectkd.errors import ConfigError
from selectkd.loss.extras.adaptive_alpha import adaptive_alpha
from selectkd.loss.teacher_rows import Head
from selectkd.loss.terms import Forward, Term
from selectkd.objective import plugins
from selectkd.objective.contract import check_divergence, check_verifier
from selectkd.objective.divergences import DIVERGENCES, is_unpaired, states
from selectkd.objective.divergences.closed_form import closed_form_of
from selectkd.objective.divergences.from_top_k import MERGED, UNDECLARED, from_top_k
from selectkd.objective.registry import name_in
from selectkd.teachers.exactness import of_divergence, of_verifier

OUTSIDE = textwrap.dedent(
    '''
    from dataclasses import dataclass

    from selectkd import component

    @component("divergence")
    def squared_hellinger(logp, logq, *, scale=1.0):
        """scale * (1 - sum sqrt(p q))."""
        return (scale * 0.5 * ((0.5 * logp).exp() - (0.5 * logq).exp()).square().sum(-1))

    @component("verifier")
    @dataclass(frozen=True)
    class top_mass:
        """a = 1 where the teacher gives the proposal at least `least`."""

        least: float = 0.1
        uniforms_per_token = 0
        teacher_tokens = None

        def __call__(self, pair, uniform):
            return (pair.logp.gather(-1, pair.student_top[:, None])[:, 0].exp() >= self.least).to(pair.logp.dtype)
    '''
)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(OUTSIDE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_allowed", {})
    allow_plugin("my_losses")
    yield
    sys.modules.pop("my_losses", None)


def test_a_divergence_and_a_verifier_from_outside_train(outside):
    objective = Objective(
        {"name": "my_losses:squared_hellinger", "scale": 2.0},
        {"name": "my_losses:top_mass", "least": 0.05},
        beta=0.2,
    )
    check_divergence(objective.divergence, bound=2.0)
    check_verifier(objective.verifier, accepts_equal=False)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 4, generator=generator).requires_grad_()
    weight, teacher = torch.randn(20, 4, generator=generator), torch.randn(9, 4, generator=generator)
    loss, _ = distillation_loss(hidden, weight, LiveRows(teacher, weight), objective)
    loss.backward()
    assert loss.item() > 0 and hidden.grad.abs().max() > 0


def test_an_outside_name_that_is_not_there_is_refused(outside):
    with pytest.raises(ConfigError, match="my_losses:nothing"):
        Objective("my_losses:nothing", "always")


def test_a_misspelt_name_or_parameter_is_answered_with_the_right_one():
    with pytest.raises(ConfigError, match="forward_kl"):
        Objective("foward_kl", "always")
    with pytest.raises(ConfigError, match="'alpha'"):
        Objective({"name": "skew_kl", "alhpa": 0.2}, "always")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (
            lambda p, q: -(p.exp() * q.clamp(min=-50)).sum(-1),
            "p = q|negative",
        ),  # cross-entropy is not 0 at p = q
        (lambda p, q: (p.exp() * (p - q)).sum(-1).mean(), "shape"),
        (lambda p, q: (p.exp() - q.exp()).abs().sum(-1) / (1 + p.exp().sum()), "token-local|p = q"),
    ],
)
def test_the_contract_fails_for_what_is_no_divergence(broken, says):
    with pytest.raises(AssertionError, match=says):
        check_divergence(broken)


def _named(name: str):
    """A divergence from outside that goes by the name of one of ours."""

    def own(logp, logq):
        return (logp.exp() - logq.exp()).square().sum(-1)

    own.__name__ = own.__qualname__ = name
    return own


@pytest.mark.parametrize("name", ["forward_kl", "skew_kl", "total_variation"])
def test_a_divergence_that_has_the_name_of_ours_is_not_taken_for_it(name):
    own = _named(name)
    assert closed_form_of(own) is None and from_top_k(own) is UNDECLARED
    assert name_in(DIVERGENCES, own) is None and name_in(DIVERGENCES, DIVERGENCES[name]) == name
    assert of_divergence(own, "sampled").verdict == "refused"


def test_a_verifier_that_has_the_name_of_ours_is_not_taken_for_it():
    def always(pair, uniform):
        return pair.logp.exp().amax(-1)

    assert of_verifier(always, "sampled").verdict == "refused"
    assert of_verifier(Objective("forward_kl", "always").verifier, "sampled").verdict == "exact"


def test_an_extra_leaves_a_divergence_that_has_the_name_of_its_own_alone():
    n, v = 6, 8
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 4, generator=generator), torch.randn(v, 4, generator=generator)
    zero, labels = torch.zeros(n, dtype=torch.long), torch.arange(n)
    forward = Forward(hidden, Head(weight), LiveRows(hidden, weight), labels, zero, zero, torch.empty(n, 0))
    for divergence, changed in ((_named("skew_kl"), False), (DIVERGENCES["skew_kl"], True)):
        term = Term(Objective(divergence, "always"))
        (after,) = adaptive_alpha()(forward, [term], step=0)
        assert (after.objective.divergence is not term.objective.divergence) == changed


def test_what_a_divergence_states_holds_with_its_parameters_bound():
    @states(closed_form=lambda block, scale=1.0: scale, from_top_k=MERGED, pairs=False)
    def own(logp, logq, *, scale=1.0):
        return scale * (logp - logq).sum(-1)

    bound = partial(own, scale=3.0)
    form = closed_form_of(bound)
    assert form is not None and form(None) == 3.0
    assert from_top_k(bound) is MERGED and is_unpaired(bound)
