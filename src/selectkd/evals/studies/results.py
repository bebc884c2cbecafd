"""A study's rows as text: a table of its arms, what became of its claims, and the smallest difference it could see."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from selectkd.config.study import Claim, Study, Trend
from selectkd.evals.statistics import Interval, t_interval
from selectkd.evals.studies.rows import Key, Row, number, paired
from selectkd.evals.studies.study import Arm, arms_of, chosen_rates

POWER = 0.8
SHOWN = (
    "held_out_kl", "held_out_loss", "loss_before", "tar", "acceptance", "overlap", "exact_match", "parse_rate",
    "calibration_error", "draft_acceptance", "draft_speedup", "top_eigenvalue", "sharpness", "kappa", "theorem_1_share",
    "nondecreasing_share", "flips", "rank_correlation", "option_accuracy", "yes_no_accuracy",
)  # fmt: skip
"""Columns of the table, where the rows have them; parse_rate where any student wrote Python."""
CHANCE = {"option_accuracy": 0.25, "yes_no_accuracy": 0.5}
"""Measures of drawn scenes that stand by task in tables of their own, and what a model that sees nothing comes to."""
LAST_PART = 0.2
"""The end of a run over which the fall of its held-out KL says how near to a plateau it came; more, where the last look
before it was earlier."""
CHANCES = 20
"""Of so many 95% intervals between arms that do not differ one leaves out 0 by chance."""


@dataclass(frozen=True)
class Compared:
    """second minus first over the seeds that both have, with Student's t interval, and the smallest true difference
    that such a study finds with a chance of POWER."""

    first: str
    second: str
    measure: str
    difference: Interval
    detectable: float


def compared(study: Study, rows: Mapping[Key, Row], first: str, second: str, measure: str) -> Compared | None:
    """Two arms of a study side by side; None before both have a seed in common."""
    apart = paired(rows, chosen_rates(study, rows), first, second, study.seeds, measure)
    if not apart:
        return None
    return Compared(first, second, measure, t_interval(apart), detectable(apart))


def detectable(differences: Sequence[float]) -> float:
    """The true mean difference that a two-sided t test at 5% finds with chance POWER, from the spread of n paired
    differences: (t(.975) + t(POWER)) s / sqrt(n), both quantiles with n - 1 degrees of freedom; infinite for n = 1.

    Source: Student's t; the usual approximation of its power, here to a few per cent from n = 5 on.

    >>> round(detectable([1.0, 2.0, 3.0, 4.0, 5.0]), 2)
    2.63
    """
    n = len(differences)
    if n < 2:
        return math.inf
    mean = sum(differences) / n
    spread = math.sqrt(sum((one - mean) ** 2 for one in differences) / (n - 1))
    reach = stats.t.ppf(0.975, n - 1) + stats.t.ppf(POWER, n - 1)
    return float(reach * spread / math.sqrt(n))


def slope(study: Study, rows: Mapping[Key, Row], trend: Trend) -> Interval | None:
    """The change of a trend's number with each doubling of its quantity: the least-squares slope on log2 of the
    quantity in each seed that all arms have, then Student's t over seeds; None without such a seed."""
    chosen, measure = chosen_rates(study, rows), trend.measure or study.outcome
    at = [math.log2(quantity) for quantity in trend.of.values()]
    found = []
    for seed in study.seeds:
        each = (number(rows.get((arm, seed, chosen.get(arm))), measure) for arm in trend.of)
        values = [one for one in each if one is not None]
        if len(values) == len(at):
            found.append(float(np.polyfit(at, values, 1)[0]))
    return t_interval(found) if found else None


def verdict(claim: Claim, seen: Compared | None) -> str:
    """confirmed, refuted or undecided, by where the interval lies; not run before there are two seeds.

    lower is confirmed by an interval below 0 and refuted by one above it; same is confirmed by one inside +- within and
    refuted by one outside it.
    """
    if seen is None or seen.difference.n < 2:
        return "not run"
    low, high = seen.difference.low, seen.difference.high
    if claim.expected == "same":
        within = claim.within or 0.0
        inside, outside = -within <= low and high <= within, high < -within or low > within
    else:
        sign = -1.0 if claim.expected == "lower" else 1.0
        inside, outside = min(sign * low, sign * high) > 0, max(sign * low, sign * high) < 0
    return "confirmed" if inside else "refuted" if outside else "undecided"


def last_fall(row: Row) -> tuple[float, float] | None:
    """(the share of a run's steps from its last look at or before 80% of them, by which share held-out KL fell over
    those steps); None without looks on the way."""
    curve = row.get("curve") or []
    if len(curve) < 3 or curve[-1][0] == 0:
        return None
    steps = curve[-1][0]
    before = next((look for look in reversed(curve) if look[0] <= (1 - LAST_PART) * steps), None)
    if before is None or not before[1] or curve[-1][1] is None:  # null where held-out KL was not finite
        return None
    return (1 - before[0] / steps, 1 - curve[-1][1] / before[1])


def markdown(
    name: str, study: Study, rows: Mapping[Key, Row], *, command: str, figure: str | None = None
) -> str:
    """The section of a study: question, statement, table, claims, comparisons, power and cost."""
    chosen, arms = chosen_rates(study, rows), arms_of(study)
    of_arm = {
        arm.name: [
            row
            for seed in study.seeds
            if (row := rows.get((arm.name, seed, chosen.get(arm.name)))) is not None
        ]
        for arm in arms
    }
    parts = [
        f"## {name}",
        study.question.strip(),
        f"**Statement, before the runs.** {study.statement.strip()}",
    ]
    claims = [_claimed(claim, study, rows) for claim in study.claims]
    if claims:
        parts.append("\n".join(f"- {line}" for line in claims))
    parts += [_rates(study), _table(study, arms, of_arm, chosen)]
    parts += [
        table for metric, chance in CHANCE.items() if (table := _scenes(metric, chance, of_arm)) is not None
    ]
    slopes = [_sloped(study, rows, trend) for trend in study.trends]
    if slopes:
        parts.append("\n".join(f"- {line}" for line in slopes))
    others = _others(study, rows, arms)
    if others:
        parts.append(
            f"Differences of {_words(study.outcome)}, second minus first, over seeds, with 95% intervals (Student's t) "
            f"and in brackets the smallest difference that the study finds four times in five{_by_chance(others)}:\n\n"
            + "\n".join(f"- {one}" for one in others)
        )
    if figure is not None:
        parts.append(f"![{name}]({figure})")
    parts.append(_cost(study, rows, of_arm, command))
    return "\n\n".join(parts) + "\n"


def _claimed(claim: Claim, study: Study, rows: Mapping[Key, Row]) -> str:
    measure = claim.measure or study.outcome
    seen = compared(study, rows, claim.first, claim.second, measure)
    expected = f"{claim.expected} than" if claim.expected != "same" else f"within {claim.within:g} of"
    text = f"**{verdict(claim, seen)}**: {_words(measure)} of {claim.second} {expected} {claim.first}"
    return text if seen is None else f"{text}: {_shown(seen)}"


def _sloped(study: Study, rows: Mapping[Key, Row], trend: Trend) -> str:
    seen, names = slope(study, rows, trend), list(trend.of)
    text = f"{_words(trend.measure or study.outcome)} with each doubling from {names[0]} to {names[-1]}"
    if seen is None:
        return f"{text}: not run"
    return f"{text}: {seen.value:+.4f}" + (
        f" [{seen.low:+.4f}, {seen.high:+.4f}], n {seen.n}" if seen.n > 1 else ""
    )


def _others(study: Study, rows: Mapping[Key, Row], arms: Sequence[Arm]) -> list[str]:
    """Every arm against the one that differs from it by its gate alone, or the first; and every gated arm against its
    controls, as far as no claim names the pair."""
    first = next(iter(study.arms))
    plain = {
        _but_for_the_gate(study, name): name for name, arm in study.arms.items() if "selection" not in arm
    }
    names = [arm.name for arm in arms if arm.control is None]
    pairs = [(plain.get(_but_for_the_gate(study, name), name), name) for name in names]
    pairs = [(first, name) if of == name else (of, name) for of, name in pairs if name != first]
    pairs += [(arm.name, arm.of) for arm in arms if arm.control is not None]
    claimed = {(one.first, one.second) for one in study.claims if one.measure in (None, study.outcome)}
    found = [compared(study, rows, *pair, study.outcome) for pair in pairs if pair not in claimed]
    return [f"{one.first} → {one.second}: {_shown(one)}" for one in found if one is not None]


def _but_for_the_gate(study: Study, name: str) -> str:
    return json.dumps(
        {key: value for key, value in study.arms[name].items() if key != "selection"}, sort_keys=True
    )


def _by_chance(intervals: Sequence[str]) -> str:
    count = len(intervals)
    return (
        f" (of {count} such intervals {count / CHANCES:.1g} leave out 0 by chance)"
        if count >= CHANCES / 2
        else ""
    )


def _shown(seen: Compared) -> str:
    one = seen.difference
    if one.n < 2:
        return f"{one.value:+.4f} (one seed)"
    return f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}], n {one.n} ({seen.detectable:.4f})"


def _table(
    study: Study, arms: Sequence[Arm], of_arm: Mapping[str, list[Row]], chosen: Mapping[str, float | None]
) -> str:
    found = {name: [number(row, name) for each in of_arm.values() for row in each] for name in SHOWN}
    columns = [
        name
        for name, values in found.items()
        if (any(values) if name == "parse_rate" else values.count(None) < len(values))
    ]
    rated = bool(study.learning_rates)
    head = ["arm", *(["learning rate"] if rated else []), "seeds", *map(_words, columns)]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for arm in arms:
        rows = of_arm[arm.name]
        good = [row for row in rows if not row.get("error")]
        cells = [arm.name, *([_rate(study, chosen.get(arm.name))] if rated else []), str(len(good))]
        for name in columns:
            values = [value for row in good if (value := number(row, name)) is not None]
            cells.append(_mean(values, name == study.outcome))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _scenes(metric: str, chance: float, of_arm: Mapping[str, list[Row]]) -> str | None:
    """The table of a measure of drawn scenes by task, None where no run has it."""
    good = {name: [row for row in rows if not row.get("error")] for name, rows in of_arm.items()}
    names = {key for rows in good.values() for row in rows for key in row if key.startswith(f"{metric} ")}
    tasks = [name for name in sorted(names) if not name.endswith(")")]
    if not tasks:
        return None

    def cell(rows: list[Row], task: str) -> str:
        means = [
            [value for row in rows if (value := number(row, name)) is not None]
            for name in (task, f"{task} (blank)", f"{task} (shuffled)")
        ]
        if not all(means):
            return ""
        one, blank, other = map(t_interval, means)
        reach = f" ± {one.high - one.value:.2f}" if one.n > 1 else ""
        return f"{one.value:.2f}{reach} ({blank.value:.2f}, {other.value:.2f})"

    lines = [
        f"{_words(metric).capitalize()} by task with 95% intervals over seeds (Student's t), and in brackets with a "
        f"blank image and with another scene's; a model that sees nothing comes to {chance:g}:",
        "",
        f"| arm | {' | '.join(task.removeprefix(metric).strip() for task in tasks)} |",
        "|" + "---|" * (len(tasks) + 1),
    ]
    lines += [f"| {name} | {' | '.join(cell(rows, task) for task in tasks)} |" for name, rows in good.items()]
    return "\n".join(lines)


def _rates(study: Study) -> str:
    if not study.learning_rates:
        return "All arms have the recipe's learning rate; none was tuned."
    tried = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    return (
        f"Each arm has the learning rate of {tried} that is best by {_words(study.tuned_by or study.outcome)} on seed "
        f"{study.tuning_seed}, which counts nowhere else, and on the same held-out text."
    )


def _rate(study: Study, rate: float | None) -> str:
    if rate is None:
        return ""
    edge = rate in (min(study.learning_rates), max(study.learning_rates)) and len(study.learning_rates) > 1
    return f"{rate:g}" + (" (end of the grid)" if edge else "")


def _mean(values: Sequence[float], with_reach: bool) -> str:
    if not values:
        return ""
    one = t_interval(values)
    return f"{one.value:.4f} ± {one.high - one.value:.4f}" if with_reach and one.n > 1 else f"{one.value:.4f}"


def _cost(study: Study, rows: Mapping[Key, Row], of_arm: Mapping[str, list[Row]], command: str) -> str:
    falls = [fall for each in of_arm.values() for row in each if (fall := last_fall(row)) is not None]
    failed = sum(1 for row in rows.values() if row.get("error"))
    seconds = sum(row.get("wall_seconds", 0.0) for row in rows.values())
    text = f"{len(rows)} runs in {seconds / 60:.0f} minutes, {failed} failed; `{command}`."
    if falls:
        spans, by = zip(*falls, strict=True)
        least, most = (f"{100 * of(spans):.0f}%" for of in (min, max))
        last = least if least == most else f"{least} to {most}"
        text += (
            f" Over the last {last} of a run's steps held-out KL still fell by"
            f" {100 * sum(by) / len(by):.1f}% (at most {100 * max(by):.1f}%)."
        )
    warned = [
        set(row.get("warnings") or ()) for each in of_arm.values() for row in each if not row.get("error")
    ]
    common = sorted(set.intersection(*warned)) if warned else []
    return text + "".join(f"\n\nEvery run warned: {one}" for one in common)


def _words(name: str) -> str:
    words = {"held_out_kl": "held-out KL", "held_out_loss": "held-out loss", "tar": "TAR"}
    return {**words, "loss_before": "held-out loss at step 0"}.get(name, name.replace("_", " "))
