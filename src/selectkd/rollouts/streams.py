"""The streams of a run and the loss of each, from a recipe: one for each source and each writer of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selectkd.errors import ConfigError
from selectkd.loss.extras import EXTRAS
from selectkd.loss.extras.policy_gradient import policy_gradient
from selectkd.loss.options import LossOptions
from selectkd.loss.plan import Extra, StreamSpec
from selectkd.objective.objective import LOSSES
from selectkd.objective.registry import bind, build, name_of
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS

WRITERS: Mapping[str, tuple[str, ...]] = {
    "dataset": ("dataset",),
    "teacher": ("teacher",),
    "student": ("dataset", "student"),
    "adaptive": ("dataset", "student"),
    "pairs": ("teacher", "student"),
    "interleaved": ("both",),
    "teacher_mixed": ("both",),
}
"""Who may have written the text of a source under each policy."""


@dataclass(frozen=True)
class Stream:
    """Text of one source by one writer. ``source`` counts the recipe's sources from 0."""

    name: str
    source: int
    writer: str


def streams_of(
    names: Sequence[str], policies: Sequence[Any], written_by: Sequence[str | None] = ()
) -> list[Stream]:
    """The streams of a recipe: first one a source, under its name, then NAME.WRITER for what others write of it.

    written_by: of each source whose file says it. The first stream of a source is its text as it stands, or what a
    policy that always writes makes of it.
    """
    first, more = [], []
    for number, (name, policy) in enumerate(zip(names, policies, strict=True)):
        writers = WRITERS[policy.name]
        if getattr(policy, "with_source", False):
            writers = ("dataset", *writers)
        if policy.name == "student" and policy.probability == 1.0:
            writers = ("student",)
        if policy.name == "dataset" and written_by and written_by[number] is not None:
            writers = (str(written_by[number]),)
        first.append(Stream(name, number, writers[0]))
        more += [Stream(f"{name}.{writer}", number, writer) for writer in writers[1:]]
    names_of = [stream.name for stream in first + more]
    twice = sorted({name for name in names_of if more and names_of.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two streams are called {twice[0]}. Give the sources other names (data.sources[].name)."
        )
    return first + more


def losses_of(recipe: Any, streams: Sequence[Stream]) -> list[StreamSpec]:
    """The changes each stream makes to the run's objective; an empty list where no stream changes anything.

    ``objective`` counts least, then ``objective.by_writer``, then the source's own ``objective``.
    """
    specs = []
    writers = {stream.writer for stream in streams}
    for writer, changes in recipe.objective.by_writer.items():
        if changes is not None and writer not in writers:
            raise ConfigError(
                f"objective.by_writer.{writer} names a writer that no policy uses: the policies give text by "
                f"{', '.join(sorted(writers))}. Set it to null, or change data.policy."
            )
    for stream in streams:
        layers = [recipe.objective.by_writer.get(stream.writer), recipe.data.sources[stream.source].objective]
        changes: dict[str, Any] = {}
        for layer in layers:
            changes |= {} if layer is None else layer.model_dump(exclude_none=True)
        selector, verifier = recipe.objective.selector, recipe.objective.verifier
        selector, verifier = changes.get("selector", selector), changes.get("verifier", verifier)
        weight = changes.get("weight", 1.0)
        if not isinstance(weight, Mapping):
            weight = {"start": weight, "end": weight, "share": 1.0}
        both = selector is not None and verifier is not None
        divergence = changes.get("divergence")
        specs.append(
            StreamSpec(
                divergence=None if divergence is None else bind(LOSSES, divergence, kind="divergence"),
                verifier=_gate(changes, both),
                beta=changes.get("beta"),
                selector=build(SELECTORS, selector, kind="selector") if selector and both else None,
                weight=(weight["start"], weight["end"], weight.get("share", 1.0)),
                language_model=recipe.objective.language_model if stream.writer in LABELLED else 0.0,
            )
        )
    if recipe.objective.language_model and not any(spec.language_model for spec in specs):
        raise ConfigError(
            f"objective.language_model = {recipe.objective.language_model} needs text by the data set or the teacher, "
            "and no source has any. Set it to 0, or add a source with policy: dataset."
        )
    return [] if all(spec == StreamSpec() for spec in specs) else specs


LABELLED = ("dataset", "teacher")
"""Writers whose text ``language_model`` trains on: not the student's own."""


def options_of(recipe: Any, losses: Sequence[StreamSpec], extras: Sequence[Extra]) -> LossOptions:
    """A recipe's options of the loss; KL is measured too where some divergence is not KL at temperature 1."""
    training, objective = recipe.training, recipe.objective
    own = (name_of(loss.divergence) for loss in losses if loss.divergence)
    plain = {objective.divergence["name"], *own} == {"forward_kl"} and objective.temperature == 1.0
    return LossOptions(
        temperature=objective.temperature,
        chunk=training.chunk,
        also_kl=bool(extras) or not plain,
        gradient_filter=training.gradient_filter,
        compiled=training.compile_loss,
    )


def extras_of(recipe: Any) -> list[Extra]:
    """The extras of a recipe, checked against its policies."""
    extras = [build(EXTRAS, dict(spec), kind="extra") for spec in recipe.objective.extras]
    for extra in extras:
        if isinstance(extra, policy_gradient):
            shares = {getattr(policy, "share", None) for policy in recipe.data.policies}
            if shares != {extra.share}:
                raise ConfigError(
                    f"objective.extras policy_gradient(share={extra.share}) corrects for text drawn with that share of "
                    f"the teacher; data.policy says {sorted(map(str, shares))}. Use policy: "
                    f"{{name: teacher_mixed, share: {extra.share}}}."
                )
            shaped = [
                p for p in recipe.data.policies if (p.temperature, p.top_p, p.top_k) != (1.0, 1.0, None)
            ]
            if shaped:
                raise ConfigError(
                    "objective.extras policy_gradient corrects for text drawn from the models' own distributions; "
                    f"data.policy {shaped[0].name} shapes them. Leave out its temperature, top_p and top_k."
                )
    return extras


def check_labels(extras: Sequence[Extra], payload: str, source: str) -> None:
    """ConfigError where an extra needs the teacher's probability of each of the student's tokens, and it has none."""
    gives = {"top_k": "gives its best tokens", "sampled": "gives drawn ids"}
    gives["aligned"] = "has another tokenizer, whose spans of text have one probability for several tokens"
    if extras and payload in gives:
        names = ", ".join(name_of(type(extra)) for extra in extras)
        also = " and the student's tokenizer" if payload == "aligned" else ""
        raise ConfigError(
            f"objective.extras {names} ask for the teacher's probability of the text's own tokens, and {source} "
            f"{gives[payload]}. Use a teacher that gives hidden states{also} (live, or a cache built with payload: "
            "hidden)."
        )


def _gate(changes: Mapping[str, Any], both: bool) -> Any:
    """A stream's verifier, or selector where it has no verifier; None where the run's stands."""
    spec = changes.get("verifier") or (None if both else changes.get("selector"))
    return None if spec is None else build({**VERIFIERS, **SELECTORS}, spec, kind="verifier or selector")
