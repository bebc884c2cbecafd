"""What the studies say of gates over plain distillation, and whether signs before training foretell it.

    python benchmarks/advice.py [--studies studies] [--write] [--record]

A pair is a plain arm (method: kd) and an arm that differs from it by a gate alone, of the same study. Its signs are
those that `selectkd doctor` measures, of the student of the first seed. A gate helps where its arm is better than the
plain one in the study's outcome with the whole 95% interval over seeds (Student's t), and hurts where it is worse so;
otherwise no difference was seen. A rule foretells help or none: a gate that hurts and one without a difference both
count as none, because plain distillation costs less.

The rule is a threshold on one sign, of every gate or of one, or plain distillation always. It is chosen by leaving each
teacher out in turn, and its error is measured on teachers that are left out from that choice too; a teacher's younger
and damaged copies are left out with it. Where no rule by a sign is right more often there than plain distillation, that
is the rule. --write puts the table where `selectkd doctor` reads it, --record adds rows to results.csv. A pair whose
models are not here, or are others, keeps the signs that the table has.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from record import record
from transformers.utils.logging import disable_progress_bar

from selectkd.config.load import recipe_from
from selectkd.config.schema import Recipe
from selectkd.config.study import HIGHER_IS_BETTER, Study, load_study
from selectkd.errors import ConfigError, SelectKDError
from selectkd.evals.studies.results import compared
from selectkd.evals.studies.rows import read_rows
from selectkd.evals.studies.study import chosen_rates, of_recipes
from selectkd.objective.plugins import allow_plugin
from selectkd.training.assembly import assemble
from selectkd.training.heldout.evaluation import evaluate
from selectkd.training.preflight.advice import TABLE, WORDS, HeldBack, Rule, Table, in_words
from selectkd.training.preflight.doctor import with_probe
from selectkd.training.preflight.signs import Signs, signs_of

MEASURES = ("held_out_kl", "held_out_loss")
SAME_MODELS = 1e-3
"""By which share held-out KL at step 0 may differ from a row's: that of other processors' rounding."""
COPIES = re.compile(r"-(age-\d+|wrong|unsure)$")
"""What the laboratory adds to a teacher's name for its younger and damaged copies."""
LOOKED = ("evaluate_every", "log_every", "probe_samples", "output_dir")
"""Keys of ``training`` that change what is looked at, not what is trained."""
Pair = dict[str, Any]
Counted = tuple[int, int, int]
"""pairs rightly foretold, pairs that a gate helped, and how many of those were foretold."""


def recipe_with(study: Study, arm: str) -> Recipe:
    """The recipe of an arm for the first seed, with a probe."""
    return with_probe(recipe_from(study.values(arm, study.seeds[0])))


def gate_of(recipe: Recipe) -> dict[str, Any] | None:
    """An arm's gate as a recipe's ``selection``; None for a plain arm."""
    objective = recipe.objective.model_dump(mode="json", exclude_none=True)
    kind = "selector" if objective.get("selector") else "verifier"
    gate = dict(objective[kind])
    if gate["name"] == "always" or objective["beta"] == 1.0:
        return None
    return {kind: gate.pop("name"), **gate, "beta": objective["beta"]}


def but_for_the_gate(recipe: Recipe) -> str:
    """Everything of a recipe that two arms of a pair have in common."""
    values = recipe.model_dump(mode="json")
    values.pop("selection")
    for key in ("verifier", "selector", "beta"):
        values["objective"].pop(key)
    for key in LOOKED:
        values["training"].pop(key)
    return json.dumps(values, sort_keys=True)


def arms_of(study: Study) -> Iterator[tuple[str, str, Recipe, dict[str, Any]]]:
    """(plain arm, gated arm, recipe of the plain one, gate) of every pair; a gate from a plug-in knows what a user does
    not, and is left out, and so is a selector beside a verifier, which are two gates.
    """
    recipes = {arm: recipe_with(study, arm) for arm in study.arms}
    recipes = {
        arm: one for arm, one in recipes.items() if not (one.objective.selector and one.objective.verifier)
    }
    common = {arm: but_for_the_gate(recipe) for arm, recipe in recipes.items()}
    for plain, gated in itertools.permutations(recipes, 2):
        recipe, gate = recipes[plain], gate_of(recipes[gated])
        if recipe.method != {"name": "kd"} or gate_of(recipe) is not None or common[plain] != common[gated]:
            continue
        if gate is not None and ":" not in (gate.get("verifier") or gate["selector"]):
            yield plain, gated, recipe, gate


def missing(recipe: Recipe) -> list[str]:
    """Model folders of a recipe that are not whole."""
    folders = [Path(name) for name in recipe.models if name.startswith((".", "/"))]
    return [
        str(path)
        for path in folders
        if not (path / "config.json").is_file() or not [*path.glob("*.safetensors")]
    ]


def signs_before(recipe: Recipe, begun: float | None) -> tuple[Signs, int]:
    """The signs of a recipe's pair before training, and how many parameters the student has.

    begun: held-out KL at step 0 by the study's row. ConfigError where the models here have another one, or where one
    is not there.
    """
    if absent := missing(recipe):
        raise ConfigError(f"{', '.join(absent)} is not there")
    assembly = assemble(recipe)
    of = (assembly.student, assembly.teacher)
    if begun is not None:
        kl = evaluate(*of, assembly.heldout, assembly.objective).kl
        if abs(kl - begun) > SAME_MODELS * begun:
            raise ConfigError(
                f"the models here begin at a held-out KL of {kl:.5g} and those of the rows at {begun:.5g}, so they are "
                "others. Make the models of the rows."
            )
    signs = signs_of(*of, assembly.probe, precision=assembly.precision)
    if signs is None:
        raise ConfigError("the teacher gives no whole distributions. Signs need a teacher in memory.")
    return signs, sum(p.numel() for p in assembly.student.parameters())


def named(part: Any) -> str:
    """A recipe's teacher or student by name."""
    parts = [one.teacher for one in part] if isinstance(part, list) else [part]
    return " and ".join(str(one.model or getattr(one, "cache", None)) for one in parts)


def pairs_of(folder: Path, known: Sequence[Pair] = ()) -> tuple[list[Pair], list[str]]:
    """The studied pairs of a folder, and what was left out and why. known: pairs of an older table, whose signs stand
    for those of models that are not here.
    """
    found: dict[str, Pair] = {}
    older = {(pair["study"], pair["plain"], pair["gated"]): pair for pair in known}
    measured: dict[str, tuple[Signs, int]] = {}
    left: dict[str, None] = {}
    for path in sorted(folder.glob("*.yaml")):
        study = load_study(path)
        rows = of_recipes(study, read_rows(path.with_suffix(".jsonl")))
        rates = chosen_rates(study, rows)
        for plain, gated, recipe, gate in arms_of(study):
            differences = {
                measure: one.difference
                for measure in dict.fromkeys((*MEASURES, study.outcome))
                if (one := compared(study, rows, plain, gated, measure)) is not None and one.difference.n > 1
            }
            if study.outcome not in differences:
                left[f"{path.stem}: {plain} and {gated} have no rows of two seeds"] = None
                continue
            of_pair = but_for_the_gate(recipe)
            key = json.dumps([of_pair, gate, rates.get(plain), rates.get(gated), study.seeds])
            if key in found:  # the same two trainings stand in another study
                continue
            curve = rows.get((plain, study.seeds[0], rates[plain]), {}).get("curve")
            old = older.get((path.stem, plain, gated))
            try:
                if of_pair not in measured:
                    measured[of_pair] = signs_before(recipe, curve[0][1] if curve else None)
                signs, parameters = measured[of_pair]
            except SelectKDError as error:
                if old is None:
                    left[f"{path.stem}: {error}"] = None
                    continue
                signs, parameters = Signs(**old["signs"]), old["parameters"]
            found[key] = {
                "study": path.stem, "plain": plain, "gated": gated, "gate": gate,
                "teacher": named(recipe.teacher), "student": named(recipe.student), "parameters": parameters,
                "outcome": study.outcome, "seen": seen(asdict(differences[study.outcome]), study.outcome),
                "seeds": differences[study.outcome].n, "learning_rates": [rates.get(plain), rates.get(gated)],
                "signs": {name: rounded(value) for name, value in signs.as_dict().items()},
                "differences": {
                    name: {key: rounded(value) for key, value in asdict(one).items()}
                    for name, one in differences.items()
                },
            }  # fmt: skip
    return list(found.values()), list(left)


def seen(difference: Mapping[str, float], measure: str) -> str:
    """What a difference, gated minus plain, says of the gate."""
    sign = -1.0 if measure in HIGHER_IS_BETTER else 1.0
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    return "helps" if high < 0 else "hurts" if low > 0 else "no difference"


def rounded(value: Any) -> Any:
    """Five digits of a number."""
    return float(f"{value:.5g}") if isinstance(value, float) else value


@dataclass(frozen=True)
class Family:
    """Rules that differ by their threshold alone."""

    sign: str
    above: bool
    gate: Mapping[str, Any] | None

    def best(self, pairs: Sequence[Pair]) -> Rule:
        """The rule that is right on the most pairs; of equal ones the one that has a gate for the fewest teachers."""
        values = np.array([pair["signs"][self.sign] for pair in pairs])
        spoken_of = np.array([self.gate in (None, pair["gate"]) for pair in pairs])
        helps = np.array([pair["seen"] == "helps" for pair in pairs])
        known = np.unique(values)
        cuts = np.concatenate([(known[1:] + known[:-1]) / 2, known[:1], known[-1:]])[:, None]
        yes = (values >= cuts if self.above else values <= cuts) & spoken_of  # [cuts, pairs]
        right, gated = (yes == helps).sum(1), yes.sum(1)
        best = max(range(len(cuts)), key=lambda cut: (right[cut], -gated[cut]))
        if (right[best], -gated[best]) <= ((~helps).sum(), 0):
            return Rule()
        return Rule(self.sign, self.above, float(cuts[best, 0]), self.gate)


def families(pairs: Sequence[Pair]) -> list[Family]:
    """Every sign, either way, for all gates and for each that several teachers were studied with."""
    teachers: dict[str, set[str]] = {}
    for pair in pairs:
        teachers.setdefault(json.dumps(pair["gate"]), set()).add(pair["teacher"])
    gates = [None, *(json.loads(gate) for gate, seen_with in teachers.items() if len(seen_with) > 1)]
    return [Family(sign, above, gate) for gate in gates for sign in WORDS for above in (True, False)]


def counted(rule: Rule, pairs: Sequence[Pair]) -> Counted:
    """How a rule does on pairs."""
    helps = [pair["seen"] == "helps" for pair in pairs]
    said = [rule.expects_help(pair["signs"], pair["gate"]) for pair in pairs]
    right = sum(one == other for one, other in zip(helps, said, strict=True))
    return right, sum(helps), sum(one and other for one, other in zip(helps, said, strict=True))


def by_teacher(pairs: Sequence[Pair]) -> list[tuple[list[Pair], list[Pair]]]:
    """(pairs of the other teachers, pairs of one teacher and its copies) for each teacher."""
    of = [COPIES.sub("", pair["teacher"]) for pair in pairs]
    return [
        (
            [pair for pair, its in zip(pairs, of, strict=True) if its != one],
            [pair for pair, its in zip(pairs, of, strict=True) if its == one],
        )
        for one in dict.fromkeys(of)
    ]


def fitted(pairs: Sequence[Pair]) -> Rule:
    """The rule of the family that is right most often about teachers left out; plain distillation where none is right
    more often than that.
    """
    splits = by_teacher(pairs)
    best, chosen = counted(Rule(), pairs)[0], None
    for family in families(pairs) if len(splits) > 1 else ():
        right = sum(counted(family.best(others), left_out)[0] for others, left_out in splits)
        if right > best:
            best, chosen = right, family
    if chosen is None:
        return Rule()
    return replace(rule := chosen.best(pairs), advised=advised(rule, pairs))


def advised(rule: Rule, pairs: Sequence[Pair]) -> Mapping[str, Any] | None:
    """The gate to take where the rule says that one helps: the one that helped most often there, less how often it
    hurt; of equal ones, that of the lowest mean difference in held-out loss."""
    if rule.gate is not None or rule.sign is None:
        return rule.gate
    there: dict[str, list[Pair]] = {}
    for pair in pairs:
        if rule.says_gate(pair["signs"]):
            there.setdefault(json.dumps(pair["gate"]), []).append(pair)

    def worth(gate: str) -> tuple[int, float]:
        worths = {"helps": 1, "hurts": -1, "no difference": 0}
        losses = [pair["differences"]["held_out_loss"]["value"] for pair in there[gate]]
        return sum(worths[pair["seen"]] for pair in there[gate]), -sum(losses) / len(losses)

    return json.loads(max(there, key=worth))


@dataclass(frozen=True)
class Fit:
    """The table of pairs, with the rule and its error on teachers held back from choosing it."""

    pairs: list[Pair]

    @cached_property
    def held_back(self) -> HeldBack:
        splits = by_teacher(self.pairs)
        if len(splits) < 3:
            return HeldBack(0, len(splits), 0, 0, 0, 0)
        counts = [counted(fitted(others), left_out) for others, left_out in splits]
        right, helped, found = (sum(column) for column in zip(*counts, strict=True))
        return HeldBack(len(self.pairs), len(splits), len(self.pairs) - helped, right, helped, found)

    @property
    def table(self) -> Table:
        held = self.held_back
        rule = fitted(self.pairs) if held.by_sign > held.plain else Rule()
        return Table(rule, held, self.pairs)


def judged_by(pairs: Sequence[Pair], measure: str) -> list[Pair]:
    """The same pairs, with what was seen by another measure than their study's outcome."""
    return [
        {**pair, "seen": seen(pair["differences"][measure], measure)}
        for pair in pairs
        if measure in pair["differences"]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints pairs, rule and error."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--studies", type=Path, default=Path("studies"))
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args(arguments)
    disable_progress_bar()
    allow_plugin("lab_noise")
    table = Table.read(TABLE)
    pairs, left = pairs_of(given.studies, () if table is None else table.pairs)
    for one in left:
        print(f"left out: {one}")
    for pair in pairs:
        one = pair["differences"][pair["outcome"]]
        signs = ", ".join(f"{name} {pair['signs'][name]:.3g}" for name in WORDS)
        print(
            f"{pair['study']}: {pair['plain']} -> {pair['gated']}, {in_words(pair['gate'])}: {pair['seen']}, "
            f"{pair['outcome']} {one['value']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}], n {one['n']}; "
            f"teacher {pair['teacher']}; {signs}"
        )
    if not pairs:
        print("no pair has both its rows and its models here")
        return 1
    rows = []
    for case, judged in [("outcome", pairs), *((name, judged_by(pairs, name)) for name in MEASURES)]:
        table = Fit(judged).table
        held = table.held_back
        print(f"by {case}, {len(judged)} pairs: {table.rule.sentence}; teachers held back: {held}")
        for who, count, of in (
            ("rule by a sign", held.by_sign, held.pairs),
            ("plain distillation", held.plain, held.pairs),
            ("helping gates foretold", held.found, held.helped),
        ):
            if of:
                rows.append((f"teachers held back, by {case}", who, "share right", count / of, "", of))
    if given.write:
        Fit(pairs).table.write(TABLE)
        print(f"wrote {TABLE}")
    if given.record:
        record("advice", rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
