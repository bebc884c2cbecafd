"""The arms of a comparison: each a method, plain, selected or a control, as the values of a recipe."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from selectkd.config.expand import GATE_KEYS, gates_of
from selectkd.config.load import recipe_from
from selectkd.config.methods import METHODS
from selectkd.config.schema import Recipe
from selectkd.errors import ConfigError
from selectkd.evals.studies.rows import rate_of_others
from selectkd.objective.registry import build, did_you_mean
from selectkd.objective.selectors import SELECTORS
from selectkd.objective.verifiers import VERIFIERS, traits_of

SET_ASIDE = (
    "divergence", "verifier", "selector", "beta", "by_writer", "extras", "language_model", "reduction", "thin_rejected",
)  # fmt: skip
"""Keys of ``objective`` that a method brings: what the recipe says of them is left out where methods are compared."""

SELECTION = {"verifier": "greedy_topk", "k": 5, "beta": 0.01}
"""The paper's, where the recipe has no selection of its own."""

PLAIN, SELECTED, RANDOM, POSITION = "none", "selected", "matched_random", "matched_position"
SHUFFLE = "matched_shuffle"
"""What an arm does with rows: nothing; the selection; random rows at the rate the selection had in the arm it controls
for; the selection's verdicts on the arm's own student, dealt out among rows at like places of their sequences, or among
all rows."""


@dataclass(frozen=True)
class Arm:
    """One run of a comparison: what it is called, and which of the recipe's values it has. method: NAME or
    NAME+OPTION.
    """

    recipe: str
    method: str
    selection: str
    seed: int
    values: Mapping[str, Any] = field(repr=False)

    @property
    def key(self) -> tuple[str, str, str, int]:
        return (self.recipe, self.method, self.selection, self.seed)

    @property
    def folder(self) -> str:
        """A name for its run folder."""
        parts = (self.recipe, self.method.replace("+", "-"), self.selection, str(self.seed))
        return "-".join(part for part in parts if part)


def method_of(word: str) -> Any:
    """``kd`` or ``gkd+on_policy`` as a recipe's ``method``; ConfigError for a name or an option that is none."""
    name, *options = word.split("+")
    if name not in METHODS:
        raise ConfigError(
            f"--methods: {name!r} is no method.{did_you_mean(name, METHODS)} Known: {', '.join(METHODS)}."
        )
    for option in options:
        known = METHODS[name].options
        if option not in known:
            raise ConfigError(
                f"--methods: {name} has no option {option!r}.{did_you_mean(option, known)} It has: "
                f"{', '.join(known) or 'none'}."
            )
    return {"name": name, **dict.fromkeys(options, True)} if options else name


def arms(
    recipes: Mapping[str, Mapping[str, Any]], methods: Sequence[str], *, seeds: int, controls: bool = False
) -> list[Arm]:
    """Every recipe (name -> values) under every method, or as it stands without methods, plain and selected, for each
    seed.

    The seeds are the recipe's own and the next ones. With ``controls`` each selected arm is followed by two: random
    rows, as many as it selected, and its gate's verdicts on the control's own student among rows at like places of an
    answer; see ``controls_of``.
    """
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds} makes no run; give 1 or more.")
    found: list[Arm] = []
    for name, values in recipes.items():
        first = int((values.get("training") or {}).get("seed", 42))
        for seed in range(first, first + seeds):
            for word in methods or ("",):
                selected = _values(values, word, SELECTED, seed) if controls else None
                possible = () if selected is None else controls_of(recipe_from(selected)).values()
                for selection in (PLAIN, SELECTED, *possible):
                    arm_values = _values(values, word, selection, seed)
                    found.append(
                        Arm(name if len(recipes) > 1 else "", word or "recipe", selection, seed, arm_values)
                    )
    return found


def controls_of(recipe: Recipe) -> dict[str, str]:
    """``possible_controls`` of a recipe's gate; none where it lets everything pass, or is a control itself.

    ConfigError for a gate that cannot be made, and for one that no control is of: where a text has a gate of its own,
    or a selector stands beside ``always``.
    """
    objective, selector = recipe.objective, None
    gate = objective.gate
    if objective.verifier and objective.selector:
        selector = objective.selector
        if gate["name"] == "always":
            raise ConfigError(
                f"a control takes the place of a verifier, and always beside the selector {selector['name']} is none. "
                "Leave out the verifier and set beta to 0, which trains on the same tokens."
            )
    if gate["name"] == "always" or objective.beta == 1.0 or gate["name"].startswith("matched_"):
        return {}
    own = [(f"objective.by_writer.{writer}", stream) for writer, stream in objective.by_writer.items()] + [
        (f"data.sources.{number}.objective", one.objective) for number, one in enumerate(recipe.data.sources)
    ]
    for where, stream in own:
        named = [key for key in GATE_KEYS if stream is not None and getattr(stream, key) is not None]
        if named:
            raise ConfigError(
                f"{where} sets {' and '.join(named)}, and a control replaces one gate that all text has. Leave out the "
                "controls, or give all text one gate."
            )
    return possible_controls(gate, selector)


def possible_controls(gate: Mapping[str, Any], selector: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Each control that is asked for and the one that a verifier or selector has: none by position where it ranks rows;
    its weights dealt out to random rows where they may exceed 1, since no random rows have such a rate, and where a
    selector stands beside it: a row does not say how many of the tokens it kept were accepted. ConfigError for a gate
    that cannot be made.

    >>> possible_controls({"name": "spec_k", "k": 5})
    {'matched_random': 'matched_random', 'matched_position': 'matched_position'}
    >>> possible_controls({"name": "iw_opd"})
    {'matched_random': 'matched_shuffle'}
    """
    traits = traits_of(build({**VERIFIERS, **SELECTORS}, gate, kind="verifier or selector"))
    found = {RANDOM: SHUFFLE if traits.above_one or selector is not None else RANDOM}
    return found if traits.ranks else {**found, POSITION: POSITION}


def _gate(selection: Mapping[str, Any]) -> dict[str, Any]:
    """The verifier of a selection, or its selector where it has no verifier."""
    gates = gates_of(selection)
    return gates.get("verifier") or gates["selector"]


def _values(values: Mapping[str, Any], word: str, selection: str, seed: int) -> dict[str, Any]:
    arm_values: dict[str, Any] = copy.deepcopy(dict(values))
    # a run that is killed is run again from its start, so that a checkpoint would only cost time
    arm_values["training"] = {"save_every": None, **(arm_values.get("training") or {}), "seed": seed}
    chosen = arm_values.pop("selection", None) or SELECTION
    if word:
        arm_values["method"] = method_of(word)
        objective = {k: v for k, v in (arm_values.get("objective") or {}).items() if k not in SET_ASIDE}
        arm_values["objective"] = objective
        if "reference" not in METHODS[word.split("+")[0]].needs:
            arm_values.pop("reference", None)  # it costs memory and a forward pass that nothing reads
    if selection != PLAIN:
        objective = arm_values.get("objective") or {}
        arm_values["objective"] = {k: v for k, v in objective.items() if k not in ("verifier", "beta")}
        if selection != SELECTED and "verifier" not in gates_of(chosen):
            arm_values["objective"]["selector"] = None  # the control stands for it, and for a method's own
        arm_values["selection"] = (
            _dealt_out(chosen, selection) if selection in (POSITION, SHUFFLE) else chosen
        )
    return arm_values


def _dealt_out(chosen: Mapping[str, Any], control: str) -> dict[str, Any]:
    """A selection whose verifier's verdicts a control deals out."""
    if chosen.get("verifier") == "greedy_topk":  # the control's own default, with the k beside it
        return {**chosen, "verifier": control}
    beside = ("selector", "beta") if chosen.get("verifier") else ("beta",)
    kept = {key: chosen[key] for key in beside if key in chosen}
    return {**kept, "verifier": {"name": control, "of": _gate(chosen)}}


def controlled(arm: Arm, selected: Mapping[str, Any]) -> Arm:
    """The arm of random rows once the row of the selected arm is there, at its rate of acceptance; ConfigError where
    that is none. No selector stands beside its gate: such an arm has another control."""
    values: dict[str, Any] = copy.deepcopy(dict(arm.values))
    beta = values["selection"].get("beta", 0.01)
    always = bool((values.get("objective") or {}).get("always_accept"))
    rate = rate_of_others(selected, always_accept=always)
    values["selection"] = {"verifier": "matched_random", "rate": rate, "beta": beta}
    return Arm(arm.recipe, arm.method, arm.selection, arm.seed, values)
