"""Published methods as partial recipes: data policy x divergence x verifier x extras, each number with its source.

``method: NAME`` in a recipe stands for the parts of one entry of METHODS, and ``method: {name: NAME, OPTION: true}``
for those with an option's parts over them; whatever the recipe says itself counts more. Each runs plain, and with
SelecTKD's verifier where the recipe has a ``selection``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class Option:
    """A named departure from a method's parts: what it does, and the parts it changes."""

    doc: str
    parts: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """One line of what it does, its parts (a partial recipe), where it comes from, and what else it can be.

    cites: dotted key of a part -> where its value is from. options: departures, of the released code for instance.
    needs: keys a recipe must give beside it.
    """

    doc: str
    parts: Mapping[str, Any]
    source: str
    cites: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Option] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


def _loss(divergence: str, /, *, within: Mapping[str, Any] | None = None, **params: Any) -> dict[str, Any]:
    """An objective of one divergence on every token; ``within`` holds other keys of the objective."""
    named = {"divergence": {"name": divergence, **params}}
    return {"objective": {"verifier": {"name": "always"}, **named, **(within or {})}}


SELECTKD = "SelecTKD (arXiv 2510.24021)"
OURS = "default of ours"
"""Where no paper's value is known to us, or the paper leaves it open."""


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "selectkd-paper": Method(
            "SelecTKD's Variant A: full weight where the student's best is in the teacher's top k, else beta.",
            _loss("forward_kl", within={"verifier": {"name": "greedy_topk", "k": 5}, "beta": 0.01}),
            f"{SELECTKD}, Algorithm 1.",
            {"objective.verifier.k": SELECTKD, "objective.beta": SELECTKD},
            {
                "spec_k": Option(
                    "Variant B: full weight where one of the student's k proposals passes.",
                    {"objective": {"verifier": {"name": "spec_k", "k": 5}}},
                )
            },
        ),
        "kd": Method(
            "Plain distillation: forward KL on every token of the data set.",
            _loss("forward_kl"),
            "Hinton et al. (arXiv 1503.02531).",
        ),
        "seqkd": Method(
            "Cross-entropy on text that the teacher wrote, once for each prompt.",
            {"data": {"policy": {"name": "teacher", "temperature": 0.0}}, **_loss("cross_entropy")},
            "Kim and Rush 2016 (arXiv 1606.07947); the teacher's best text, here greedy.",
            {"data.policy.temperature": f"{OURS}: greedy, for the paper's beam search"},
            {
                "stored": Option(
                    "The source holds the teacher's text already (`selectkd generate`).",
                    {"data": {"policy": {"name": "dataset"}}},
                )
            },
        ),
        "imitkd": Method(
            "Forward KL; with probability .5 the text is a student's, from a replay buffer.",
            {
                "data": {"policy": {"name": "student", "probability": 0.5, "replay": 1000}},
                **_loss("forward_kl"),
            },
            "ImitKD (arXiv 2009.07253), as compared with in DistiLLM (arXiv 2402.03898).",
            {"data.policy.probability": "DistiLLM: its baselines", "data.policy.replay": "DistiLLM's buffer"},
            {
                "fresh": Option(
                    "Every text of the student is trained on once, when it is new.",
                    {"data": {"policy": {"replay": None}}},
                )
            },
        ),
        "gkd": Method(
            "Generalised Jensen-Shannon; a sequence's text is the student's own with probability .5.",
            {
                "data": {"policy": {"name": "student", "probability": 0.5, "temperature": 0.9}},
                **_loss("generalized_jsd", beta=0.5),
            },
            "GKD (arXiv 2306.13649).",
            {
                "data.policy.probability": "GKD: lambda",
                "data.policy.temperature": "GKD's defaults in TRL",
                "objective.divergence.beta": "GKD",
            },
            {
                "on_policy": Option(
                    "Every text is the student's (lambda = 1).", {"data": {"policy": {"probability": 1.0}}}
                ),
                "forward_kl": Option(
                    "Forward KL for the divergence.", {"objective": {"divergence": {"name": "forward_kl"}}}
                ),
                "reverse_kl": Option(
                    "Reverse KL for the divergence.", {"objective": {"divergence": {"name": "reverse_kl"}}}
                ),
            },
        ),
        "minillm": Method(
            "Sequence-level reverse KL by policy gradient on teacher-mixed text, with a language-modelling loss.",
            {
                "data": {"policy": {"name": "teacher_mixed", "share": 0.2, "with_source": True}},
                "objective": {
                    "divergence": {"name": "reverse_kl"},
                    "verifier": {"name": "always"},
                    "by_writer": {"dataset": {"weight": 0.0}},
                    "language_model": 1.0,
                    "extras": [{"name": "policy_gradient", "share": 0.2, "clip": 100.0}],
                },
            },
            "MiniLLM (arXiv 2306.08543); its language-modelling text is a pre-training corpus, here the source's own.",
            {
                "data.policy.share": "MiniLLM: alpha",
                "data.policy.with_source": f"{OURS}: the paper has a pre-training corpus",
                "objective.extras.share": "MiniLLM: alpha",
                "objective.extras.clip": "MiniLLM: cliprange_reward of its scripts; its code's default is 1",
                "objective.language_model": f"{OURS}; the paper adds the loss",
                "objective.by_writer.dataset.weight": f"{OURS}: the source's text is for language modelling alone",
            },
            {
                "plain": Option(
                    "Without the language-modelling loss.",
                    {
                        "data": {"policy": {"with_source": False}},
                        "objective": {"language_model": 0.0, "by_writer": {"dataset": None}},
                    },
                )
            },
        ),
        "distillm": Method(
            "Skew KL; DistiLLM's scheduler says how often the text is the student's, fresh or from the buffer.",
            {
                "data": {
                    "policy": {
                        "name": "adaptive",
                        "start": 0.0,
                        "increase": 0.1,
                        "margin": 0.1,
                        "capacity": 1000,
                    }
                },
                **_loss("skew_kl", alpha=0.1, within={"language_model": 1.0}),
            },
            "DistiLLM (arXiv 2402.03898); phi rises at evaluations, so the run needs data.evaluation and "
            "training.evaluate_every.",
            {
                "objective.divergence.alpha": "DistiLLM",
                "data.policy.start": "DistiLLM: phi",
                "data.policy.increase": "DistiLLM",
                "data.policy.margin": "DistiLLM",
                "data.policy.capacity": "DistiLLM",
                "objective.language_model": f"{OURS}; the paper adds the loss, here on the source's own text",
            },
            {
                "reverse": Option(
                    "Skew reverse KL, the paper's SRKL.",
                    {"objective": {"divergence": {"name": "skew_reverse_kl", "alpha": 0.1}}},
                ),
                "fill_first": Option(
                    "Below phi the student writes until the buffer is full, as the released code has it.",
                    {"data": {"policy": {"fill_first": True}}},
                ),
                "plain": Option(
                    "Without the language-modelling loss.", {"objective": {"language_model": 0.0}}
                ),
            },
            needs=("data.evaluation", "training.evaluate_every"),
        ),
        "distillm2": Method(
            "Skew KL on the teacher's text of a prompt and skew reverse KL on the student's, half each.",
            {
                "data": {"policy": {"name": "pairs", "temperature": 0.8, "top_p": 0.95}},
                "objective": {
                    "verifier": {"name": "always"},
                    "by_writer": {
                        "teacher": {"divergence": {"name": "skew_kl", "alpha": 0.1}, "weight": 1.0},
                        "student": {
                            "divergence": {"name": "skew_reverse_kl", "alpha": 0.1, "detach_mixture": True},
                            "weight": 1.0,
                        },
                    },
                },
            },
            "DistiLLM-2 (arXiv 2503.07067); the mean over both halves is the paper's 1 / (2 |D|).",
            {
                "data.policy.temperature": "DistiLLM-2",
                "data.policy.top_p": "DistiLLM-2",
                "objective.by_writer.teacher.divergence.alpha": "DistiLLM-2: alpha_0",
                "objective.by_writer.student.divergence.alpha": "DistiLLM-2: alpha_0",
                "objective.by_writer.student.divergence.detach_mixture": "DistiLLM-2's released code",
                "objective.by_writer.teacher.weight": "DistiLLM-2: 2 - beta at beta = 1, as released",
                "objective.by_writer.student.weight": "DistiLLM-2: beta = 1, as released",
            },
            {
                "gradual": Option(
                    "The weight of the student's half rises from 1 to 1.5 over the first half, the other falls to .5.",
                    {
                        "objective": {
                            "by_writer": {
                                "teacher": {"weight": {"start": 1.0, "end": 0.5, "share": 0.5}},
                                "student": {"weight": {"start": 1.0, "end": 1.5, "share": 0.5}},
                            }
                        }
                    },
                ),
                "adaptive_alpha": Option(
                    "alpha follows the gap of the sequence probabilities; the released code has it off.",
                    {"objective": {"extras": [{"name": "adaptive_alpha", "start": 0.1, "floor": 0.01}]}},
                ),
                "through_mixture": Option(
                    "The gradient goes through the student inside the mixture, as in DistiLLM.",
                    {"objective": {"by_writer": {"student": {"divergence": {"detach_mixture": False}}}}},
                ),
                "fresh": Option(
                    "The source holds the teacher's text (`selectkd generate`); the student writes its half anew.",
                    {"data": {"policy": {"teacher_text": "source"}}},
                ),
                "stored": Option(
                    "Both halves are stored: two sources of one file, written_by: teacher and written_by: student.",
                    {"data": {"policy": {"name": "dataset"}}},
                ),
            },
        ),
        "skd": Method(
            "Forward KL on text that student and teacher write in turn: tokens outside its top 25 are the teacher's.",
            {"data": {"policy": {"name": "interleaved", "window": 25}}, **_loss("forward_kl")},
            "SKD (arXiv 2410.11325).",
            {"data.policy.window": "SKD"},
            {
                "jsd": Option(
                    "Generalised Jensen-Shannon at .5.",
                    {"objective": {"divergence": {"name": "generalized_jsd", "beta": 0.5}}},
                )
            },
        ),
        "opd": Method(
            "Reverse KL of the sampled token as an advantage, on the student's own text.",
            {
                "data": {"policy": {"name": "student", "probability": 1.0}},
                **_loss("sampled_reverse_kl", within={"reduction": "token_mean"}),
            },
            "On-policy distillation by the sampled token: stop-gradient advantage, coefficient 1, discount 0.",
            cites={
                "data.policy.probability": "on-policy by its name",
                "objective.reduction": OURS,
            },
            options={
                "whole_vocabulary": Option(
                    "The exact reverse KL of each position instead of its estimate.",
                    {"objective": {"divergence": {"name": "reverse_kl"}}},
                )
            },
        ),
        "abkd": Method(
            "alpha-beta divergence on the data set.",
            _loss("alpha_beta", alpha=0.2, beta=0.7),
            "ABKD (arXiv 2505.04560).",
            {"objective.divergence.alpha": "ABKD", "objective.divergence.beta": "ABKD"},
        ),
        "akl": Method(
            "Adaptive KL: forward and reverse KL weighed by where the two models differ.",
            _loss("adaptive_kl", mu=0.5),
            "AKL (arXiv 2404.02657).",
            {"objective.divergence.mu": "AKL"},
        ),
        "todi": Method(
            "Token-wise mixture of forward and reverse KL.",
            _loss("todi"),
            "ToDi (arXiv 2505.16297).",
        ),
        "taid": Method(
            "Forward KL to a target that moves from the student's to the teacher's distribution.",
            _loss("taid"),
            "TAID (arXiv 2501.16937); t rises from .4 to 1, faster while the loss falls (schedules.TaidSchedule).",
        ),
        "adaspec": Method(
            "Forward KL on the 40% of the tokens that a reference student finds easiest to gain on; mean over them.",
            {
                "objective": {
                    "divergence": {"name": "forward_kl"},
                    "selector": {"name": "adaspec", "share": 0.4},
                    "beta": 0.0,
                    "reduction": "weight_mean",
                }
            },
            "AdaSPEC (arXiv 2510.19779); the reference is a student distilled by forward KL before (method: kd).",
            {
                "objective.selector.share": "AdaSPEC",
                "objective.beta": "AdaSPEC: the other tokens are left out",
                "objective.reduction": "AdaSPEC: the mean over the kept tokens",
            },
            needs=("reference",),
        ),
        "adakd": Method(
            "Forward KL at a temperature of each token's own, on the tokens where the models differ most.",
            {
                "objective": {
                    "divergence": {"name": "token_temperature", "scale": 0.5},
                    "selector": {"name": "adakd", "share": 1.0, "change": 0.1, "floor": 0.1},
                    "beta": 0.0,
                    "reduction": "weight_mean",
                }
            },
            "AdaKD (arXiv 2510.11615); the share of tokens follows the loss.",
            {
                "objective.divergence.scale": "AdaKD: its released code",
                "objective.selector.share": "AdaKD: it starts with all tokens",
                "objective.selector.change": "AdaKD",
                "objective.selector.floor": "AdaKD",
                "objective.beta": "AdaKD: the other tokens are left out",
                "objective.reduction": "AdaKD: the mean over the kept tokens",
            },
        ),
        "atkd": Method(
            "Hard tokens learn target and rest, easy ones the rest alone, by the teacher's surprise at the label.",
            {
                "objective": {
                    "verifier": {"name": "always"},
                    "extras": [{"name": "atkd", "easy": 0.2}],
                    "reduction": "token_mean",
                }
            },
            "ATKD (arXiv 2402.11890).",
            {
                "objective.extras.easy": "ATKD: .2 easy, .8 hard, half of the tokens each",
                "objective.reduction": OURS,
            },
        ),
        "tip": Method(
            "Forward KL on the half of the tokens with the highest entropy or divergence.",
            {"objective": {"divergence": {"name": "forward_kl"}, "selector": {"name": "tip"}, "beta": 0.0}},
            "TIP; its own share and score are the selector's defaults.",
            {"objective.beta": "TIP: the other tokens are left out"},
        ),
        "se_kd": Method(
            "Forward KL on the fifth of the tokens where the student is least certain.",
            {"objective": {"divergence": {"name": "forward_kl"}, "selector": {"name": "se_kd"}, "beta": 0.0}},
            "SE-KD; its own share is the selector's default.",
            {"objective.beta": "SE-KD: the other tokens are left out"},
        ),
    }
)
