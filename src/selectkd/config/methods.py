"""Published methods as objectives: what to write under ``objective`` for each, with its paper's own numbers.

Each runs plain with the verifier ``always`` and with SelecTKD's own in its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Method:
    """One line of what it does, the objective that does it, and where it comes from."""

    doc: str
    objective: Mapping[str, Any]
    source: str


def _plain(divergence: Mapping[str, Any], **more: Any) -> Mapping[str, Any]:
    return {"divergence": divergence, "verifier": {"name": "always"}, **more}


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "selectkd": Method(
            "SelecTKD, Variant A: full weight where the student's best is in the teacher's top k, else beta.",
            {
                "divergence": {"name": "forward_kl"},
                "verifier": {"name": "greedy_topk", "k": 5},
                "beta": 0.01,
            },
            "Source: SelecTKD (arXiv 2510.24021), Algorithm 1.",
        ),
        "selectkd_spec_k": Method(
            "SelecTKD, Variant B: full weight where one of the student's k proposals passes, else beta.",
            {"divergence": {"name": "forward_kl"}, "verifier": {"name": "spec_k", "k": 5}, "beta": 0.01},
            "Source: SelecTKD (arXiv 2510.24021), Algorithm 1.",
        ),
        "kd": Method(
            "Plain distillation: forward KL on every token.",
            _plain({"name": "forward_kl"}),
            "Source: Hinton et al. (arXiv 1503.02531).",
        ),
        "gkd": Method(
            "The loss of GKD, generalised Jensen-Shannon at .5, on the text of the data set.",
            _plain({"name": "generalized_jsd", "beta": 0.5}),
            "Source: GKD (arXiv 2306.13649).",
        ),
        "distillm": Method(
            "The loss of DistiLLM, skew KL at .1, on the text of the data set.",
            _plain({"name": "skew_kl", "alpha": 0.1}),
            "Source: DistiLLM (arXiv 2402.03898).",
        ),
        "abkd": Method(
            "alpha-beta divergence at (.2, .7).",
            _plain({"name": "alpha_beta", "alpha": 0.2, "beta": 0.7}),
            "Source: ABKD (arXiv 2505.04560).",
        ),
        "akl": Method(
            "Adaptive KL: forward and reverse KL weighed by where the two models differ.",
            _plain({"name": "adaptive_kl"}),
            "Source: AKL (arXiv 2404.02657).",
        ),
        "todi": Method(
            "Token-wise mixture of forward and reverse KL.",
            _plain({"name": "todi"}),
            "Source: ToDi (arXiv 2505.16297).",
        ),
        "taid": Method(
            "Forward KL to a target that moves from the student's to the teacher's distribution.",
            _plain({"name": "taid"}),
            "Source: TAID (arXiv 2501.16937).",
        ),
        "tip": Method(
            "Forward KL on the half of the tokens with the highest entropy or divergence.",
            {"divergence": {"name": "forward_kl"}, "selector": {"name": "tip"}, "beta": 0.0},
            "The paper's own share and score are the selector's defaults.",
        ),
        "se_kd": Method(
            "Forward KL on the fifth of the tokens where the student is least certain.",
            {"divergence": {"name": "forward_kl"}, "selector": {"name": "se_kd"}, "beta": 0.0},
            "The paper's own share is the selector's default.",
        ),
    }
)
