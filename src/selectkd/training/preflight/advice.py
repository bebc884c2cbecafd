"""Whether a gate is likely to help a pair over plain distillation, by the signs of the pair and the rows of studies.

``benchmarks/advice.py --write`` makes the table beside this file from the studies: its rule, how right the rule was
about teachers held back from fitting it, and the pairs of a plain and a gated arm that both come from.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from selectkd.training.preflight.signs import Signs

TABLE = Path(__file__).with_name("advice.jsonl")
TRUSTED = 0.8
"""The share of held-back pairs on which a rule must be right to be trusted."""
ROWS = "docs/results.md has the rows"
WORDS = {
    "tar": "TAR",
    "overlap": "overlap",
    "kl": "KL",
    "teacher_entropy": "entropy of the teacher",
    "student_entropy": "entropy of the student",
    "surprise": "surprise of the teacher beyond its entropy",
    "lead": "lead of the teacher on the text",
}
"""The signs that a rule may read, and what they are called."""


@dataclass(frozen=True)
class Rule:
    """A gate helps where ``sign`` is at least ``threshold``, or, with ``above`` False, at most that. Without a sign:
    plain distillation, always.

    gate: the one gate that the rule speaks of, as a recipe's ``selection``; None for every gate. advised: the gate to
    take where the rule says that one helps.
    """

    sign: str | None = None
    above: bool = True
    threshold: float = 0.0
    gate: Mapping[str, Any] | None = None
    advised: Mapping[str, Any] | None = None

    def says_gate(self, signs: Mapping[str, Any]) -> bool:
        """Whether a pair of these signs should have a gate."""
        if self.sign is None:
            return False
        value = signs[self.sign]
        return value >= self.threshold if self.above else value <= self.threshold

    def expects_help(self, signs: Mapping[str, Any], gate: Mapping[str, Any]) -> bool:
        """Whether this gate is expected to be better than plain distillation."""
        return self.says_gate(signs) and self.gate in (None, gate)

    @property
    def sentence(self) -> str:
        """The rule in one sentence, without its full stop."""
        if self.sign is None:
            return "plain distillation, whatever the signs"
        what = "a gate" if self.gate is None else in_words(self.gate)
        return f"{what} helps where the {WORDS[self.sign]} is at {self._bound}"

    @property
    def _bound(self) -> str:
        return f"{'least' if self.above else 'most'} {self.threshold:.3g}"


@dataclass(frozen=True)
class HeldBack:
    """What became of ``pairs`` of ``teachers`` teachers, each teacher's held back in turn from choosing a rule.

    plain: on how many pairs the answer "plain distillation" was right, since no gate helped. by_sign: on how many the
    rule that was best on the other teachers foretold help, or none. helped: pairs on which a gate helped; found: how
    many of them such a rule foretold.
    """

    pairs: int
    teachers: int
    plain: int
    by_sign: int
    helped: int
    found: int


@dataclass(frozen=True)
class Table:
    """The rule, its error, and the pairs: each with study, gate, signs, parameters, seen, and differences."""

    rule: Rule
    held_back: HeldBack
    pairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def right(self) -> int:
        """On how many held-back pairs the rule was right."""
        return self.held_back.plain if self.rule.sign is None else self.held_back.by_sign

    def write(self, path: Path) -> None:
        """JSON lines: the rule with its error, then the pairs."""
        head = {"rule": asdict(self.rule), "held_back": asdict(self.held_back)}
        lines = [json.dumps(line, allow_nan=False) + "\n" for line in (head, *self.pairs)]
        path.write_text("".join(lines), "utf-8")

    @classmethod
    def read(cls, path: Path = TABLE) -> Table | None:
        """The table of a file; None where there is none."""
        if not path.is_file():
            return None
        head, *pairs = map(json.loads, path.read_text("utf-8").splitlines())
        return cls(Rule(**head["rule"]), HeldBack(**head["held_back"]), pairs)


def in_words(gate: Mapping[str, Any]) -> str:
    """A gate as a line of a recipe.

    >>> in_words({"verifier": "greedy_topk", "k": 5, "beta": 0.01})
    'selection: {verifier: greedy_topk, k: 5, beta: 0.01}'
    """
    return f"selection: {_flow(gate)}"


def advice(signs: Signs | None, parameters: int, table: Table | None) -> str:
    """The signs of a pair, what to train with, and how far the studies bear that out.

    signs: None for a teacher whose rows are no whole distributions. parameters: of the student.
    """
    if signs is None:
        return (
            "whether a gate is likely to help is read from the teacher's whole distribution, which this teacher does "
            "not give. Use a teacher in memory, or a cache with payload: hidden, for this check"
        )
    seen = [_seen(signs), *_behind(signs)]
    if table is None or not table.pairs:
        return (
            f"{'. '.join(seen)}. No table of studied pairs is there, so no gate is advised or advised against"
        )
    seen += [_advised(signs, table.rule), _rests_on(table), _error(table)]
    outside = _outside(signs, parameters, table.pairs)
    if outside:
        seen.append(f"This pair lies outside of the studied ones, so take it with care: {', '.join(outside)}")
    return ". ".join(seen)


def _seen(signs: Signs) -> str:
    text = (
        f"TAR {signs.tar:.3f} (greedy_topk, k = 5), overlap {signs.overlap:.3f}, KL {signs.kl:.3g} nats, entropy of "
        f"the teacher {signs.teacher_entropy:.3g} and of the student {signs.student_entropy:.3g}, surprise of the "
        f"teacher beyond its entropy {signs.surprise:.3g}, lead of the teacher on the text {signs.lead:.3g}"
    )
    return text + ("" if signs.agreement is None else f", overlap of the teachers {signs.agreement:.3f}")


def _behind(signs: Signs) -> list[str]:
    """What to expect of a teacher that knows the text worse than its student."""
    if signs.lead >= 0:
        return []
    return [
        f"The student knows this text better than its teacher does, by {-signs.lead:.3g} nats a token, so distilling "
        "on it is likely to make the student worse there, with a gate or without. Take a better teacher, or text that "
        "it knows"
    ]


def _advised(signs: Signs, rule: Rule) -> str:
    if rule.sign is None:
        return "Advised: method: kd, plain distillation"
    value = f"the {WORDS[rule.sign]} is {getattr(signs, rule.sign):.3g}"
    if rule.says_gate(signs.as_dict()) and rule.advised is not None:
        return f"Advised: method: kd with {in_words(rule.advised)}, since {value}: {rule.sentence}"
    return f"Advised: method: kd, plain distillation, since {value}: {rule.sentence}"


def _rests_on(table: Table) -> str:
    count = Counter(pair["seen"] for pair in table.pairs)
    studies = ", ".join(dict.fromkeys(pair["study"] for pair in table.pairs))
    return (
        f"In {len(table.pairs)} studied pairs of plain and gated training ({studies}; {ROWS}) the gate was better in "
        f"{count['helps']}, worse in {count['hurts']}, and no difference was seen in {count['no difference']}"
    )


def _error(table: Table) -> str:
    held = table.held_back
    if not held.pairs:
        return "There are too few teachers to hold one back, so how often this is right is not known"
    text = f"With each of {held.teachers} teachers held back in turn, "
    share = f"was right on {table.right} of {held.pairs} pairs ({table.right / held.pairs:.0%})"
    if table.rule.sign is None:
        text += (
            f"plain distillation {share}, the best rule by a sign on {held.by_sign}: measurements before training do "
            "not foretell where a gate helps"
        )
    else:
        text += (
            f"the rule {share}, plain distillation on {held.plain}; of {held.helped} pairs that a gate helped the rule "
            f"foretold {held.found}"
        )
    if table.right < TRUSTED * held.pairs:
        text += ". That is too seldom to rest on: try both, `selectkd study compare RECIPE --methods kd`"
    return text


def _outside(signs: Signs, parameters: int, pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each sign that lies outside of the studied range, with both, and the student's size."""
    found = []
    for name, word in {**WORDS, "agreement": "overlap of the teachers"}.items():
        value = getattr(signs, name)
        known = [one for pair in pairs if (one := pair["signs"][name]) is not None]
        if value is None:
            continue
        if not known:
            found.append("several teachers, where all studied pairs had one")
        elif not min(known) <= value <= max(known):
            found.append(f"{word} {value:.3g} ({min(known):.3g} to {max(known):.3g})")
    sizes = [pair["parameters"] for pair in pairs]
    if not min(sizes) <= parameters <= max(sizes):
        found.append(f"a student of {parameters:,} parameters ({min(sizes):,} to {max(sizes):,})")
    return found


def _flow(value: Any) -> str:
    """Plain data in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_flow(each)}" for key, each in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value)
