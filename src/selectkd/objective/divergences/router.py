"""A divergence that depends on the row: a list of routes, each a gate, a divergence and a weight. n rows."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.from_top_k import NO_DIRECTION, Exactness
from selectkd.objective.divergences.record import states
from selectkd.objective.pair import TokenPair
from selectkd.objective.registry import bind, build, did_you_mean, name_of, unbound
from selectkd.objective.verifiers import VERIFIERS, traits_of

KEYS = ("gate", "divergence", "weight")
BY_ENTROPY = (
    {"gate": {"name": "teacher_entropy", "max": 0.8}, "divergence": "reverse_kl"},
    {"divergence": "forward_kl"},
)
"""Forward KL where the teacher's entropy exceeds .8 nats, reverse KL elsewhere."""


@dataclass(frozen=True)
class Route:
    """The rows that a gate accepts, None for all that are left, their divergence and its weight."""

    gate: Callable[..., Tensor] | None
    divergence: Callable[..., Tensor]
    weight: float


def routes_of(routes: Sequence[Any]) -> tuple[Route, ...]:
    """The routes of a recipe, checked: ConfigError names the one that cannot work."""
    if isinstance(routes, str) or not isinstance(routes, Sequence):
        raise ConfigError("router: routes is a list of {gate: ..., divergence: ..., weight: ...}.")
    return _read(json.dumps(list(routes), sort_keys=True, default=str))


@functools.lru_cache(maxsize=64)
def _read(text: str) -> tuple[Route, ...]:
    from selectkd.objective.divergences import DIVERGENCES

    found = []
    for place, one in enumerate(json.loads(text)):
        if not isinstance(one, dict) or "divergence" not in one:
            raise ConfigError(f"router: routes[{place}] needs a divergence: {{gate: ..., divergence: ...}}.")
        for key in one:
            if key not in KEYS:
                raise ConfigError(f"router: routes[{place}] has no key {key!r}.{did_you_mean(key, KEYS)}")
        gate = None if one.get("gate") is None else build(VERIFIERS, one["gate"], kind="verifier")
        if gate is not None and (traits_of(gate).ranks or traits_of(gate).uniforms_per_token):
            raise ConfigError(
                f"router: routes[{place}].gate = {name_of(gate)} ranks rows or draws random numbers; a route's gate "
                "decides each row from both distributions alone, as teacher_entropy does."
            )
        weight = one.get("weight", 1.0)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight >= 0:
            raise ConfigError(f"router: routes[{place}].weight = {weight!r} must be a number of 0 or more.")
        found.append(Route(gate, bind(DIVERGENCES, one["divergence"], kind="divergence"), float(weight)))
    if not found:
        raise ConfigError("router: routes is empty; give at least {divergence: forward_kl}.")
    return tuple(found)


def check_routes(divergence: Any) -> None:
    """ConfigError now, and not at the first row, where a divergence is a router whose routes cannot work."""
    function, params = unbound(divergence)
    if function is router:
        routes_of(params.get("routes", BY_ENTROPY))


def _from_top_k(routes: Sequence[Any] = BY_ENTROPY) -> Exactness:
    routes_of(routes)
    return NO_DIRECTION


@states(from_top_k=_from_top_k)
def router(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, routes: Sequence[Any] = BY_ENTROPY
) -> Float[Tensor, " n"]:
    """sum_r weight_r share_r D_r(p || q), share_r = a_r of what the routes before left; a_r the gate's acceptance.

    A route without a gate takes all that is left; what no route takes has no loss. Shares carry no gradient. In
    [0, inf), 0 at p = q. The default routes by the teacher's entropy, at .8 nats. Raises ConfigError for a gate that
    ranks rows, draws random numbers or reads the text.

    >>> import torch
    >>> from selectkd.objective.divergences import forward_kl, reverse_kl
    >>> p = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]]).log()
    >>> q = torch.tensor([[0.2, 0.4, 0.4]] * 2).log()
    >>> routed = router(p, q)
    >>> (routed[0] == reverse_kl(p, q)[0]).item(), (routed[1] == forward_kl(p, q)[1]).item()
    (True, True)
    """
    found = routes_of(routes)
    left = torch.ones_like(logp[:, 0])
    total = torch.zeros_like(logq[:, 0])
    pair = TokenPair(logp.detach(), logq.detach(), student_top=logq.detach().argmax(-1))
    for route in found:
        with torch.no_grad():
            share = left if route.gate is None else left * route.gate(pair, logp.new_empty(len(logp), 0))
            left = left - share
        total = total + route.weight * share * route.divergence(logp, logq)
    return total
