"""Token-wise divergences: pure functions (logp [n, s], logq [n, s]) -> [n] in nats. DIVERGENCES names them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from torch import Tensor

from selectkd.objective.divergences.acceptance import kl_tv_hybrid, neg_log_acceptance, total_variation
from selectkd.objective.divergences.adaptive import adaptive_kl, taid, todi
from selectkd.objective.divergences.alpha_beta import alpha_beta
from selectkd.objective.divergences.kl import (
    forward_kl,
    generalized_jsd,
    jeffreys,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
)
from selectkd.objective.divergences.label import (
    LABEL_LOSSES,
    cross_entropy,
    decoupled_kl,
    reads_label,
    sampled_reverse_kl,
)
from selectkd.objective.divergences.record import Divergence, states
from selectkd.objective.divergences.router import router
from selectkd.objective.divergences.temperature import token_temperature
from selectkd.objective.divergences.uld import is_unpaired, uld

DIVERGENCES: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jeffreys": jeffreys,
        "skew_kl": skew_kl,
        "skew_reverse_kl": skew_reverse_kl,
        "generalized_jsd": generalized_jsd,
        "total_variation": total_variation,
        "alpha_beta": alpha_beta,
        "adaptive_kl": adaptive_kl,
        "todi": todi,
        "taid": taid,
        "neg_log_acceptance": neg_log_acceptance,
        "kl_tv_hybrid": kl_tv_hybrid,
        "uld": uld,
        "router": router,
        "token_temperature": token_temperature,
    }
)

__all__ = [
    "DIVERGENCES",
    "LABEL_LOSSES",
    "Divergence",
    "adaptive_kl",
    "alpha_beta",
    "cross_entropy",
    "decoupled_kl",
    "forward_kl",
    "generalized_jsd",
    "is_unpaired",
    "jeffreys",
    "kl_tv_hybrid",
    "neg_log_acceptance",
    "reads_label",
    "reverse_kl",
    "router",
    "sampled_reverse_kl",
    "skew_kl",
    "skew_reverse_kl",
    "states",
    "taid",
    "todi",
    "token_temperature",
    "total_variation",
]
