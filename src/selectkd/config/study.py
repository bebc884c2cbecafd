"""What a study may say: arms of one recipe, seeds, learning rates, measures, and statements made before it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator
from typing_extensions import Self

from selectkd.config.expand import laid
from selectkd.config.load import recipe_from, text_of
from selectkd.config.problems import Problem, explained, raised
from selectkd.config.schema import Recipe
from selectkd.config.section import Name, Section, Text, Whole, refuse
from selectkd.config.teachers import CacheTeacher
from selectkd.config.yaml_text import read
from selectkd.errors import ConfigError
from selectkd.objective.plugins import search
from selectkd.objective.registry import did_you_mean

Control = Literal["matched_random", "matched_position"]
Measure = Literal["completions", "calibration", "draft", "sharpness", "dynamics"]
Outcome = Literal[
    "held_out_kl", "held_out_loss", "tar", "overlap", "exact_match", "parse_rate", "calibration_error",
    "draft_acceptance", "draft_speedup", "top_eigenvalue", "sharpness", "kappa", "theorem_1_share",
    "nondecreasing_share", "flips", "rank_correlation", "option_accuracy", "yes_no_accuracy",
]  # fmt: skip
HIGHER_IS_BETTER = (
    "tar", "overlap", "exact_match", "parse_rate", "draft_acceptance", "draft_speedup", "kappa", "theorem_1_share",
    "nondecreasing_share", "option_accuracy", "yes_no_accuracy",
)  # fmt: skip
NEEDED: Mapping[str, str] = MappingProxyType(
    {
        **dict.fromkeys(("exact_match", "parse_rate"), "completions"),
        "calibration_error": "calibration",
        **dict.fromkeys(("draft_acceptance", "draft_speedup"), "draft"),
        **dict.fromkeys(("top_eigenvalue", "sharpness"), "sharpness"),
        **dict.fromkeys(
            ("kappa", "theorem_1_share", "nondecreasing_share", "flips", "rank_correlation"), "dynamics"
        ),
        **dict.fromkeys(("option_accuracy", "yes_no_accuracy"), "vision"),
    }
)
"""The measure that gives each number which not every row has."""
Seed = Annotated[int, Field(ge=0, le=2**32 - 1), Whole]


class DrawnScenes(Section):
    """The synthetic suite of `selectkd eval --suite vision`, asked of every student."""

    name: Literal["vision"]
    """vision: the synthetic suite."""
    scenes: Annotated[int, Field(ge=2), Whole] = 40
    """Scenes of each task; each is asked 6 questions with its image, with a blank one and with another scene's."""
    size: Annotated[int, Field(ge=32), Whole] = 224
    """Pixels across a drawn scene."""


class Claim(Section):
    """A difference of two arms that the study expects, second minus first."""

    first: Text
    """Name of an arm; NAME/matched_random, NAME/matched_position and NAME/matched_shuffle are controls of the arm
    NAME."""
    second: Text
    """Name of the other arm."""
    measure: Outcome | None = None
    """The number that is compared. Left out: the study's outcome."""
    expected: Literal["lower", "higher", "same"]
    """Whether the second arm's number is expected to be lower, higher or the same."""
    within: Annotated[float, Field(gt=0.0)] | None = None
    """How far two numbers may lie apart that count as the same. Needed where expected is same."""

    @model_validator(mode="after")
    def _same_has_a_width(self) -> Self:
        if (self.expected == "same") != (self.within is not None):
            raise refuse("needs within where expected is same, and there alone")
        return self


class Trend(Section):
    """How a number of several arms goes with a quantity in which they differ, such as the teacher's size."""

    of: Annotated[dict[Text, Annotated[float, Field(gt=0.0)]], Field(min_length=2)]
    """Name of each arm, and its quantity."""
    measure: Outcome | None = None
    """The number. Left out: the study's outcome."""

    @model_validator(mode="after")
    def _quantities_differ(self) -> Self:
        if len(set(self.of.values())) < 2:
            raise refuse("has one quantity for all arms, and no slope goes with it", at="of")
        return self


class Study(Section):
    """A study: arms that differ from one recipe, each run with every seed."""

    question: Text
    """The question that the study answers."""
    statement: Text
    """What would confirm the expectation and what would refute it, written before the first run."""
    recipe: dict[str, Any]
    """The recipe that every arm starts from. `{seed}` in a text stands for the run's seed."""
    arms: Annotated[dict[Name, dict[str, Any]], Field(min_length=1)]
    """Name of each arm, and the keys of the recipe in which it differs."""
    controls: list[Control] = []
    """Controls that are run beside every gated arm. `matched_random`: random tokens at its rate of acceptance; for a
    gate whose weights may exceed 1, which has no such rate, `matched_shuffle`, its weights dealt out to random tokens.
    `matched_position`, not for a gate that ranks tokens: its verdicts on the control's own student, dealt out among
    tokens at like places of an answer; their rate is that of this student."""
    learning_rates: list[Annotated[float, Field(gt=0.0)]] = []
    """Learning rates that every arm and control is tried with; each takes its best. Left out: the recipe's."""
    tuning_seed: Seed = 0
    """Seed of the runs that choose the learning rate; none of the seeds."""
    seeds: Annotated[list[Seed], Field(min_length=1)]
    """Seeds of the runs that count."""
    outcome: Outcome = "held_out_kl"
    """The number by which arms are compared."""
    tuned_by: Outcome | None = None
    """The number by which learning rates are chosen. Left out: the outcome. Set it where the outcome of one seed is
    mostly chance, such as draft_acceptance of a few prompts."""
    measures: list[Measure | DrawnScenes] = []
    """Further measures of every student: `completions` (exact_match, parse_rate), `calibration`, `draft`,
    `sharpness`, `dynamics` (kappa, theorem_1_share, nondecreasing_share, flips, rank_correlation; needs
    training.probe_samples), and `vision`, a mapping of its name, scenes of each task and their size in pixels
    (option_accuracy, yes_no_accuracy)."""
    claims: list[Claim] = []
    """Differences that the statement expects."""
    trends: list[Trend] = []
    """Slopes that are reported: the change of a number with each doubling of a quantity."""

    @model_validator(mode="after")
    def _seeds_are_apart(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise refuse(f"= {self.seeds} names a seed twice", at="seeds")
        if self.learning_rates and self.tuning_seed in self.seeds:
            raise refuse(f"= {self.tuning_seed} is one of the seeds; choose another", at="tuning_seed")
        if len(set(self.learning_rates)) < len(self.learning_rates):
            raise refuse(f"= {self.learning_rates} names a rate twice", at="learning_rates")
        for key in ("tuned_by", "tuning_seed"):
            if key in self.model_fields_set and not self.learning_rates:
                raise refuse("does nothing without learning_rates, which are chosen by it", at=key)
        return self

    @model_validator(mode="after")
    def _seeds_alone_seed_the_runs(self) -> Self:
        for where, values in [
            ("recipe", self.recipe),
            *((f"arms.{arm}", one) for arm, one in self.arms.items()),
        ]:
            training = values.get("training")
            if isinstance(training, dict) and "seed" in training:
                raise refuse(
                    "sets training.seed, which seeds and tuning_seed set for every run; take it out", at=where
                )
        return self

    @model_validator(mode="after")
    def _numbers_are_measured(self) -> Self:
        asked = {one if isinstance(one, str) else one.name for one in self.measures}
        named = [("outcome", self.outcome), ("tuned_by", self.tuned_by)]
        named += [("claims", claim.measure) for claim in self.claims]
        named += [("trends", trend.measure) for trend in self.trends]
        for key, number in named:
            needed = NEEDED.get(number or "")
            if needed is not None and needed not in asked:
                raise refuse(f"names {number}, which no row has without {needed} in measures", at=key)
        return self

    @model_validator(mode="after")
    def _claims_name_arms(self) -> Self:
        controls = [*self.controls, *(["matched_shuffle"] if "matched_random" in self.controls else [])]
        known = [*self.arms, *(f"{arm}/{control}" for arm in self.arms for control in controls)]
        named = [("claims", name) for claim in self.claims for name in (claim.first, claim.second)]
        named += [("trends", name) for trend in self.trends for name in trend.of]
        for key, name in named:
            if name not in known:
                raise refuse(f"names the arm {name!r}, which is none.{did_you_mean(name, known)}", at=key)
        return self

    def caches(self) -> dict[str, Recipe]:
        """Folder of each cache that an arm's teacher names with its model or server, and a recipe that fills it.

        ConfigError where arms name one folder for different teachers.
        """
        found: dict[str, Recipe] = {}
        for arm in self.arms:
            recipe = self.recipe_of(arm)
            for teacher in recipe.teachers:
                if not isinstance(teacher, CacheTeacher) or (teacher.model or teacher.server) is None:
                    continue
                known = found.setdefault(teacher.cache, recipe.model_copy(update={"teacher": teacher}))
                if known.teacher != teacher:
                    raise ConfigError(
                        f"arms.{arm}: teacher.cache {teacher.cache} belongs to another teacher of this study; name "
                        "another folder."
                    )
        return found

    def asked(self) -> list[str | dict[str, Any]]:
        """The measures as plain data."""
        return [one if isinstance(one, str) else one.model_dump() for one in self.measures]

    def values(self, arm: str, seed: int) -> dict[str, Any]:
        """The values of an arm's recipe for a seed."""
        values = _seeded(laid(self.recipe, self.arms[arm]), seed)
        # a run that is killed is run again from its start, so that a checkpoint would only cost time
        values["training"] = {"save_every": None, **(values.get("training") or {}), "seed": seed}
        values["training"].setdefault("output_dir", "unused")
        return values

    def recipe_of(self, arm: str) -> Recipe:
        """The checked recipe of an arm for the first seed; ConfigError names the arm."""
        try:
            recipe = recipe_from(self.values(arm, self.seeds[0]))
        except ConfigError as error:
            raise ConfigError(f"arms.{arm}: {error}") from None
        if recipe.data.evaluation is None:
            raise ConfigError(
                f"arms.{arm}: a study needs held-out text; set data.evaluation to {{path: ...}} or a share."
            )
        return recipe


def load_study(path: str | os.PathLike[str]) -> Study:
    """The study in a YAML file; ConfigError names every problem of it with its line, and of an arm's recipe."""
    source = str(path)
    document = read(text_of(Path(path), kind="study"), source=source)
    search(Path(path).parent)
    values = document.value
    if not isinstance(values, dict):
        raise ConfigError(f"{source}: a study is a mapping with question, statement, recipe, arms and seeds.")
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        problems = [
            Problem(where, source if (line := document.line(where)) is None else f"{source}:{line}", message)
            for where, message in explained(error, Study, values)
        ]
        raise raised(problems, source) from None
    for arm in study.arms:
        try:
            study.recipe_of(arm)
        except ConfigError as error:
            raise ConfigError(f"{source}:{document.line(('arms', arm))}: {error}") from None
    return study


def _seeded(value: Any, seed: int) -> Any:
    """The value with ``{seed}`` in its texts replaced."""
    if isinstance(value, dict):
        return {key: _seeded(each, seed) for key, each in value.items()}
    if isinstance(value, list):
        return [_seeded(each, seed) for each in value]
    return value.replace("{seed}", str(seed)) if isinstance(value, str) else value
