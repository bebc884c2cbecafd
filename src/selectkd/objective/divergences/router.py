"""A divergence that depends on the row: a list of routes, each a gate, a divergence and a weight. n rows."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from selectkd.errors import ConfigError
from selectkd.objective.divergences.from_top_k import NO_DIRECTION, Exactness
from selectkd.objective.divergences.record import states
from selectkd.objective.pair import TokenPair, dense_pair
from selectkd.objective.registry import bind, build, did_you_mean, name_of, tried, unbound
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
        if gate is not None and (fault := _fault_of(gate)):
            raise ConfigError(
                f"router: routes[{place}].gate = {name_of(gate)} {fault}; a route's gate decides each row from both "
                "distributions alone, as teacher_entropy does."
            )
        weight = one.get("weight", 1.0)
        if not isinstance(weight, int | float) or isinstance(weight, bool) or not weight >= 0:
            raise ConfigError(f"router: routes[{place}].weight = {weight!r} must be a number of 0 or more.")
        divergence = bind(DIVERGENCES, one["divergence"], kind="divergence")
        check_routes(divergence)
        found.append(Route(gate, divergence, float(weight)))
    if not found:
        raise ConfigError("router: routes is empty; give at least {divergence: forward_kl}.")
    return tuple(found)


def _fault_of(gate: Any) -> str | None:
    """Why a gate cannot decide a route, None where it can. A plug-in's traits need not say what it reads, so that it
    is tried on two rows without a text."""
    traits = traits_of(gate)
    faults = {
        "ranks rows or draws random numbers": traits.ranks or traits.uniforms_per_token > 0,
        "weighs rows above 1": traits.above_one,
        "compares with a reference student": traits.needs_reference,
        "reads the tokens of the text": "label_rank" in (traits.reads or ()),
    }
    for fault, found in faults.items():
        if found:
            return fault
    return None if type(gate) in VERIFIERS.values() else _fault_on_trial(gate)


def _fault_on_trial(gate: Any) -> str | None:
    width = max(2, traits_of(gate).teacher_tokens or 0)
    even = torch.full((2, width), -math.log(width))
    shape, error = tried(lambda: tuple(gate(dense_pair(even, even), torch.empty(2, 0)).shape))
    if error is not None:
        return f"fails on rows without a text ({error})"
    return None if shape == (2,) else f"gives {shape} for 2 rows, where (2,) is wanted"


def is_router(divergence: Any) -> bool:
    """Whether a divergence is the router, its routes bound or not."""
    return unbound(divergence)[0] is router


def check_routes(divergence: Any) -> None:
    """ConfigError now, and not at the first row, where a divergence is a router whose routes cannot work."""
    if is_router(divergence):
        _routes_in(divergence)


def gates_in(divergence: Any) -> list[Callable[..., Tensor]]:
    """The gates of a router and of the routers in its routes; none of any other divergence."""
    if not is_router(divergence):
        return []
    routes = _routes_in(divergence)
    own = [route.gate for route in routes if route.gate is not None]
    return own + [gate for route in routes for gate in gates_in(route.divergence)]


def _routes_in(divergence: Any) -> tuple[Route, ...]:
    return routes_of(unbound(divergence)[1].get("routes", BY_ENTROPY))


def _from_top_k(routes: Sequence[Any] = BY_ENTROPY) -> Exactness:
    routes_of(routes)
    return NO_DIRECTION


@states(from_top_k=_from_top_k)
def router(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], *, routes: Sequence[Any] = BY_ENTROPY
) -> Float[Tensor, " n"]:
    """sum_r weight_r share_r D_r(p || q), share_r = a_r of what the routes before left; a_r the gate's acceptance.

    A route without a gate takes all that is left; what no route takes has no loss. Shares carry no gradient. In
    [0, inf), 0 at p = q. The default routes by the teacher's entropy, at .8 nats. The gates see p and q as given; an
    Objective shows them both at its ``verify_temperature``. Raises ConfigError for a gate that ranks rows, draws
    random numbers, weighs above 1 or reads the text.

    >>> import torch
    >>> from selectkd.objective.divergences import forward_kl, reverse_kl
    >>> p = torch.tensor([[0.9, 0.05, 0.05], [0.4, 0.3, 0.3]]).log()
    >>> q = torch.tensor([[0.2, 0.4, 0.4]] * 2).log()
    >>> routed = router(p, q)
    >>> (routed[0] == reverse_kl(p, q)[0]).item(), (routed[1] == forward_kl(p, q)[1]).item()
    (True, True)
    """
    return _shared(logp, logq, routes_of(routes), dense_pair(logp, logq.detach()))


def routed(divergence: Callable[..., Tensor], pair: TokenPair, verified: TokenPair) -> Float[Tensor, " n"]:
    """A router's value on the rows of ``pair``, its gates deciding by ``verified``, the same rows at the temperature
    of verification. Equals ``divergence(pair.logp, pair.logq)`` where the two are one."""
    # as the log-probabilities have it: two logits may round to one of them
    top = verified.student_top if verified.tail else verified.logq.detach().argmax(-1)
    alone = replace(
        verified, logq=verified.logq.detach(), student_top=top, label=None, sequence=None, logr=None
    )
    return _shared(pair.logp, pair.logq, _routes_in(divergence), alone)


def _shared(
    logp: Float[Tensor, "n s"], logq: Float[Tensor, "n s"], routes: tuple[Route, ...], seen: TokenPair
) -> Float[Tensor, " n"]:
    """The sum over routes, whose gates decide by ``seen``; so do those of a router in a route."""
    left = torch.ones_like(logp[:, 0])
    total = torch.zeros_like(logq[:, 0])
    for route in routes:
        with torch.no_grad():
            share = left if route.gate is None else left * route.gate(seen, logp.new_empty(len(logp), 0))
            left = left - share
        if is_router(route.divergence):
            value = _shared(logp, logq, _routes_in(route.divergence), seen)
        else:
            value = route.divergence(logp, logq)
        total = total + route.weight * share * value
    return total
