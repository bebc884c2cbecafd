"""What each payload of a teacher is worth to each divergence and each verifier: exact, a bound, or refused, and why.

Divergences say it of themselves (``divergences.from_top_k``); verifiers by the traits ``teacher_tokens`` and, where
that is None, ``from_top_k``; what is here puts the two together. ``of`` is the one way to ask, ``check`` and
``check_edge`` the ways to refuse.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from selectkd.errors import ConfigError
from selectkd.objective.divergences import DIVERGENCES
from selectkd.objective.divergences.from_top_k import MERGED, REVERSE, Exactness, from_top_k
from selectkd.objective.divergences.uld import is_unpaired
from selectkd.objective.objective import Objective
from selectkd.objective.registry import name_in, name_of
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS, traits_of
from selectkd.teachers.protocol import Payload

PAYLOADS: dict[Payload, str] = {
    "live": "the model in memory",
    "hidden": "its last hidden states and its head, from a cache or from `selectkd serve-teacher`",
    "top_k": "its K best tokens, from a cache or a server; of prompts with images from vLLM (docs/vision.md)",
    "sampled": "K ids drawn from it, from a cache (sparse logit sampling)",
    "aligned": "a model of another tokenizer in memory, aligned by spans of text",
}
"""What each payload is; ``show teachers`` and docs/teachers.md have a column for each."""

WHOLE = Exactness("exact", "the whole distribution is at hand, in the precision of the hidden states")
BATCH = Exactness(
    "refused",
    "it ranks the rows of a batch by a score that K tokens and a tail do not give, so the order itself can change",
)
BATCH_ACROSS = Exactness(
    "refused", "it scores rows by comparing the two distributions token by token, and their tokens differ"
)
SILENT = Exactness(
    "refused", "it needs the whole vocabulary, and does not declare what a top-K teacher does to it"
)
SINGLE = "it compares the two distributions, of which one token and the rest say next to nothing"
WHY = {
    "upper bound": "merging the tail into one outcome never lowers the acceptance, and can raise it",
    "lower bound": "merging the tail into one outcome never raises the acceptance, and can lower it",
}


DRAWN = ("forward_kl", "always")
"""The divergence and the verifier whose gradient ids drawn from the teacher give without bias; no others."""

UNBIASED = Exactness(
    "unbiased",
    "the drawn ids give the gradient q - p in the mean; its value is larger by a constant of the text",
)
DRAWS = Exactness("refused", "drawn ids have no ranks, and only forward_kl's gradient is linear in p")
EVERY = Exactness("exact", "it takes every row and looks at nothing")
SORTED = Exactness("exact", "it compares sorted probabilities and needs no token in common")
REST = Exactness(
    "lower bound",
    "it is taken on the tokens of both, the span's text and the rest as one outcome; merging never raises it. "
    "The sorted distance of the other tokens is added",
)
UNLIKE = Exactness(
    "refused", "it is no f-divergence: nothing bounds what merging the tokens without a counterpart does"
)
TRANSLATED = Exactness(
    "exact",
    "where the proposal's bytes are a token of the teacher; the other rows are unverified, and counted",
)
APART = Exactness("refused", "it compares the two distributions token by token, and their tokens differ")


def of_divergence(divergence: Any, payload: Payload) -> Exactness:
    """What a divergence's value is from a payload; its parameters, where bound, count."""
    if payload == "sampled":
        return UNBIASED if name_in(DIVERGENCES, divergence) == DRAWN[0] else DRAWS
    if payload == "aligned":
        if is_unpaired(divergence):
            return SORTED
        return REST if from_top_k(divergence) in (MERGED, REVERSE) else UNLIKE
    return from_top_k(divergence) if payload == "top_k" else WHOLE


def of_verifier(verifier: Any, payload: Payload, *, k: int | None = None) -> Exactness:
    """What a verifier's or selector's acceptance is from a payload of K = ``k`` tokens; None: as many as it needs."""
    if payload == "sampled":
        return EVERY if type(verifier) is VERIFIERS[DRAWN[1]] else DRAWS
    traits = traits_of(verifier)
    if payload == "aligned":
        if traits.ranks:
            return BATCH_ACROSS
        if traits.teacher_tokens == 0:
            return Exactness("exact", "it does not look at the teacher")
        return TRANSLATED if traits.crosses_vocabularies else APART
    if payload != "top_k":
        return WHOLE
    need, verdict = traits.teacher_tokens, traits.from_top_k
    if need is None:
        if verdict is not None and k == 1:
            return Exactness("refused", SINGLE)
        if verdict is not None:
            return Exactness(verdict, WHY[verdict])
        return BATCH if traits.ranks else SILENT
    if need == 0:
        return Exactness("exact", "it does not look at the teacher")
    if k is not None and k < need:
        return Exactness("refused", f"it needs the teacher's {need} best tokens, and there are {k}")
    return Exactness(
        "exact", f"it asks for the {need} best tokens alone; store 2k, which shows ties across rank k"
    )


def of(objective: Objective, payload: Payload, *, k: int | None = None) -> dict[str, Exactness]:
    """What the two parts of an objective are from a payload: {"divergence": ..., "verifier": ...}."""
    return {
        "divergence": of_divergence(objective.divergence, payload),
        "verifier": of_verifier(objective.verifier, payload, k=k),
    }


def check(
    objective: Objective,
    payload: Payload,
    *,
    k: int | None = None,
    temperature: float = 1.0,
    source: str = "",
) -> None:
    """ConfigError where a payload refuses a part of the objective; says what both sides are and what would work."""
    gives = (
        "has another tokenizer"
        if payload == "aligned"
        else f"gives its {k} best tokens"
        if k
        else "gives its best tokens"
    )
    teacher = f"the teacher {source}".strip() + f" {gives}"
    names = name_of(objective.divergence), name_of(objective.verifier)
    if payload == "sampled" and "refused" in {one.verdict for one in of(objective, payload).values()}:
        raise ConfigError(
            f"drawn ids give an unbiased gradient for {DRAWN[0]} with `{DRAWN[1]}` only; the recipe "
            f"has {names[0]} with {names[1]}. Use those two, or the payload top_k or hidden."
        )
    for part, exactness in of(objective, payload, k=k).items():
        if exactness.verdict == "refused":
            other = "of the student's tokenizer" if payload == "aligned" else "that gives hidden states"
            raise ConfigError(
                f"objective.{part} = {name_of(getattr(objective, part))} cannot be taken from this teacher: "
                f"{teacher}, and {exactness.reason}. Use {_instead(part, payload)}, or a teacher {other} "
                "(live, or a cache built with payload: hidden); `selectkd show teachers` has the table."
            )
    for key, value in (("temperature", temperature), ("verify_temperature", objective.verify_temperature)):
        if payload in ("top_k", "sampled") and value != 1.0:
            raise ConfigError(
                f"objective.{key} = {value} cannot be taken from this teacher: {teacher} at temperature 1, and "
                "their tail cannot be computed at another temperature. Set it to 1.0, or use a teacher that gives "
                "hidden states."
            )
        if payload == "aligned" and value != 1.0:
            raise ConfigError(
                f"objective.{key} = {value} cannot be taken from this teacher: {teacher}, and the probability of a "
                "span is a product of its tokens' at temperature 1. Set it to 1.0."
            )


def check_edge(objective: Objective, payload: Payload, *, k: int | None) -> None:
    """ConfigError where a teacher stores its K = ``k`` best tokens and a tie across their edge would go unseen."""
    need = objective.teacher_tokens
    if payload == "top_k" and need is not None and k is not None and k < 2 * need:
        raise ConfigError(
            f"{name_of(objective.verifier)} reads the teacher's {need} best tokens and needs {2 * need} stored, so "
            f"that ties at rank {need} are detected; teacher.k is {k}. Build with k: {2 * need} or more, or set "
            f"objective.verifier.k to {k // 2} or less."
        )


def _instead(part: str, payload: Payload) -> str:
    if part == "verifier":
        return "greedy_topk with k up to the stored K" if payload != "aligned" else "greedy_topk or always"
    good = [name for name, one in DIVERGENCES.items() if of_divergence(one, payload).verdict != "refused"]
    return ", ".join(good[:-1]) + f" or {good[-1]}"


def table() -> list[dict[str, Any]]:
    """Every component at its defaults against every payload: [{kind, name, payload, verdict, reason}]."""
    rows: list[dict[str, Any]] = []
    for kind, names in (("divergence", DIVERGENCES), ("verifier", VERIFIERS), ("selector", SELECTORS)):
        for name, component in names.items():
            for payload in PAYLOADS:
                exactness = (
                    of_divergence(component, payload)
                    if kind == "divergence"
                    else of_verifier(component(), payload)
                )
                rows.append({"kind": kind, "name": name, "payload": payload, **asdict(exactness)})
    return rows


def page() -> str:
    """docs/teachers.md: the table and its reasons, written from what the code declares."""
    lines = [
        "# What a teacher's payload is worth",
        "",
        "Written by `selectkd show teachers --markdown` from what the code declares; a test holds the two equal.",
        "A row's loss is as good as the weaker of its divergence and its verifier. Unbiased: its gradient is, in the",
        "mean over the draws. Components stand at their default",
        "parameters: alpha_beta with alpha + beta = 1, jeffreys at weight 0 and taid at t = 1 are bounds too.",
        "",
    ]
    lines += [f"- **{payload}**: {what}." for payload, what in PAYLOADS.items()]
    rows = table()
    for kind in ("divergence", "verifier", "selector"):
        lines += ["", f"| {kind} | {' | '.join(PAYLOADS)} |", "|---" * (len(PAYLOADS) + 1) + "|"]
        for name in dict.fromkeys(row["name"] for row in rows if row["kind"] == kind):
            by_payload = {row["payload"]: row for row in rows if (row["kind"], row["name"]) == (kind, name)}
            lines.append(
                f"| `{name}` | " + " | ".join(by_payload[payload]["verdict"] for payload in PAYLOADS) + " |"
            )
    for payload in ("top_k", "sampled", "aligned"):
        lines += ["", f"Why, for {payload}:", ""]
        reasons = dict.fromkeys((row["verdict"], row["reason"]) for row in rows if row["payload"] == payload)
        for verdict, reason in reasons:
            names = [
                f"`{row['name']}`"
                for row in rows
                if (row["payload"], row["verdict"], row["reason"]) == (payload, verdict, reason)
            ]
            lines.append(f"- {verdict}: {reason}. ({', '.join(names)})")
    return "\n".join(lines) + "\n"


def check_reference(payload: Payload, *, source: str) -> None:
    """ConfigError for a reference student beside rows of best tokens, on which its own have no place."""
    if payload in ("top_k", "sampled"):
        raise ConfigError(
            f"reference: a reference student cannot be combined with the {payload} rows of {source}. Use a teacher "
            "that gives hidden states (live, or a cache built with payload: hidden), or a selector that needs no "
            "reference."
        )
