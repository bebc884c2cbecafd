"""Terms: which rows of a batch count under which objective, with which factor. EXTRAS names what can change them.

A plain run has one term, all rows under one objective. Streams with objectives of their own, a selector beside a
verifier, and the extras of published methods (ATKD's two halves, DistiLLM-2's adaptive alpha, MiniLLM's policy
gradient) make several; ``weighted_sum`` adds them up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from selectkd.loss.extras.adaptive_alpha import adaptive_alpha
from selectkd.loss.extras.atkd import atkd
from selectkd.loss.extras.policy_gradient import policy_gradient
from selectkd.loss.plan import Extra, FirstPass, LossPlan, StreamLoss, StreamSpec
from selectkd.loss.terms import Forward, Term, weighted_sum

EXTRAS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"atkd": atkd, "adaptive_alpha": adaptive_alpha, "policy_gradient": policy_gradient}
)

__all__ = [
    "EXTRAS",
    "Extra",
    "FirstPass",
    "Forward",
    "LossPlan",
    "StreamLoss",
    "StreamSpec",
    "Term",
    "adaptive_alpha",
    "atkd",
    "policy_gradient",
    "weighted_sum",
]
