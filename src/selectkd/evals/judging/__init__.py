"""Which of two answers is better, by a model that judges: asked in both orders, fenced, remembered, counted."""

from selectkd.evals.judging.contest import Contest, Pair, contest, unasked
from selectkd.evals.judging.judges import EndpointJudge, ModelJudge, cost
from selectkd.evals.judging.protocols import PROTOCOLS, Protocol
from selectkd.evals.judging.question import Comparison

__all__ = [
    "PROTOCOLS",
    "Comparison",
    "Contest",
    "EndpointJudge",
    "ModelJudge",
    "Pair",
    "Protocol",
    "contest",
    "cost",
    "unasked",
]
