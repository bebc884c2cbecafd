"""What a run came to, in tiles and in sentences. Every sentence follows from a rule, and RULES states them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from selectkd.evals.statistics import Difference, paired_bootstrap
from selectkd.report.charts import counted, number
from selectkd.report.lenient import is_number
from selectkd.report.looks import Look
from selectkd.report.run_files import RunFiles

COLD_TAR, SMALL, FEW_TEXTS = 0.2, 0.02, 5
"""TAR below which a gate leaves little signal; relative change that counts as none; texts an interval needs."""
GATES_OFF = ("none", "always")

RULES = (
    f"Closer or further: held-out KL after against before; a relative change below {SMALL:.0%} counts as none.",
    "Gap closed: (perplexity before - after) / (perplexity before - teacher's), where the teacher's is lower.",
    "Taken away by the gate: the mean of bite over training, the share of the divergence that weights removed.",
    "Worse than random rows: in a comparison with controls, the mean held-out KL of the selected arm lies above that "
    "of matched_random, which keeps as many rows at random.",
    f"Cold: TAR below {COLD_TAR} before training.",
    f"Intervals: 95%, paired bootstrap over the probe texts; none with fewer than {FEW_TEXTS} texts.",
)


@dataclass(frozen=True)
class Tile:
    """A number of the strip: what it is, its value, what stands beside it, and whether that is good, bad or neither."""

    name: str
    value: str
    beside: str = ""
    kind: str = ""
    help: str = ""


def tiles(run: RunFiles) -> list[Tile]:
    """The strip of one run; what was not measured says so."""
    before, after = run.before or {}, run.after or {}
    of_teacher = after.get("teacher_perplexity")
    teacher = f"teacher {number(of_teacher)}" if of_teacher else "of held-out text"
    steps = counted(run.last_step, "step") + (f", resumed {_times(len(run.resumes))}" if run.resumes else "")
    found = [
        _change("Held-out KL", before.get("kl"), after.get("kl"), "nats a token; 0 is the teacher", lower=True),
        _change(
            "Perplexity", before.get("perplexity"), after.get("perplexity"),
            teacher, lower=True,
        ),
        _change("TAR", before.get("tar"), after.get("tar"), "share of tokens the teacher accepts", lower=False),
        Tile("Bite", _percent(_mean(run, "bite")), "of the signal taken away by the gate", help="mean over training"),
        Tile("Speed", number(_median(run.clock("tokens_per_second"))), "supervised tokens a second"),
        Tile("Peak memory", in_bytes(max((v for _, v in run.clock("peak_bytes")), default=None)), _device(run)),
        Tile("Time", in_time(run.seconds), steps),
        Tile("Steps left out", number(len(run.skipped)), "a number was not finite", "bad" if run.skipped else ""),
    ]  # fmt: skip
    return found


def sentences(run: RunFiles) -> list[str]:
    """What it means, the most important first."""
    state = [_state(run)] if run.state != "finished" else []
    return [one for one in [*state, _closer(run), _gate(run), _cold(run), _skipped(run)] if one]


def _state(run: RunFiles) -> str:
    of = f" of {run.planned}" if run.planned else ""
    if run.state == "running":
        return f"The run is under way: step {run.last_step}{of}. The page shows what is there so far."
    if run.state == "failed" and run.stopped is not None:
        return f"The run failed at step {run.last_step}{of}: {str(run.stopped.get('error', ''))[:300]}"
    saved = (
        f" Its newest checkpoint is of step {run.checkpoints[-1]}; the same command goes on from there."
        if run.checkpoints
        else ""
    )
    return f"The run broke off at step {run.last_step}{of}, so none of its numbers is final.{saved}"


def _closer(run: RunFiles) -> str:
    before, after = (run.before or {}).get("kl"), (run.after or {}).get("kl")
    if before is None or after is None:
        return "How close the student is to its teacher was not measured: the recipe holds no text out."
    change = (after - before) / before if before else 0.0
    numbers = f"held-out KL {number(before)} → {number(after)} nats a token"
    if abs(change) < SMALL:
        return f"The student is as close to its teacher as before: {numbers}."
    if change > 0:
        return f"The student moved away from its teacher: {numbers}. A lower learning rate or fewer steps may help."
    first, last = (run.before or {}).get("perplexity"), (run.after or {}).get("perplexity")
    teacher, closed = (run.after or {}).get("teacher_perplexity"), ""
    if first is not None and last is not None and teacher is not None and first > teacher:
        closed = f", and closed {_percent((first - last) / (first - teacher))} of the gap in perplexity"
    return f"The student moved {_percent(-change)} closer to its teacher ({numbers}){closed}."


def _gate(run: RunFiles) -> str:
    bite = _mean(run, "bite")
    if bite is None:
        return ""
    if bite < 0.001:
        return "The gate took nothing away: every token had its full weight, as in plain distillation."
    share = f"The gate took {_percent(bite)} of the signal away"
    worse = _beside_random(run.results)
    if worse is None:
        return f"{share}; whether that helped was not measured (selectkd study compare RECIPE --controls)."
    if worse > 0:
        return f"{share} and was worse than random rows at its rate (KL {worse:+.3f}): turn it off (verifier: always)."
    return f"{share} and was better than random rows at its rate (KL {worse:+.3f})."


def _beside_random(results: list[tuple[str, Any]]) -> float | None:
    """Mean held-out KL of selected arms minus that of matched_random in a comparison; None without one."""
    of: dict[str, list[float]] = {"selected": [], "matched_random": []}
    for _, content in results:
        for row in content if isinstance(content, list) else []:
            if not isinstance(row, dict) or not is_number(row.get("held_out_kl")):
                continue
            for selection, values in of.items():
                if row.get("selection") == selection:
                    values.append(row["held_out_kl"])
    if not all(of.values()):
        return None
    return float(np.mean(of["selected"]) - np.mean(of["matched_random"]))


def _cold(run: RunFiles) -> str:
    tar = (run.before or {}).get("tar")
    if tar is None or tar >= COLD_TAR:
        return ""
    return f"The student began cold: its teacher accepted {_percent(tar)} of its tokens, and a gate keeps little."


def _skipped(run: RunFiles) -> str:
    n = len(run.skipped)
    return (
        ""
        if not n
        else f"{counted(n, 'step')} had numbers that are not finite and changed nothing; see bad_batches/."
    )


def paired(first: Look, second: Look, name: str) -> Difference | None:
    """Second minus first of a column, with the interval over texts; None with fewer than FEW_TEXTS."""
    one, other = first.by_text(name), second.by_text(name)
    if len(one) != len(other) or len(one) < FEW_TEXTS or not np.isfinite([*one, *other]).all():
        return None
    return paired_bootstrap(one, other)


def interval(found: Difference | None) -> str:
    """A difference with its interval, for people."""
    return "not measured" if found is None else f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _change(name: str, before: float | None, after: float | None, beside: str, *, lower: bool) -> Tile:
    if after is None:
        return Tile(
            name,
            "not measured" if before is None else number(before),
            beside if before is None else f"before; {beside}",
        )
    if before is None:
        return Tile(name, number(after), beside)
    better = after < before if lower else after > before
    same = abs(after - before) <= SMALL * abs(before)
    return Tile(
        name, f"{number(before)} → {number(after)}", beside, "" if same else "good" if better else "bad"
    )


def _mean(run: RunFiles, name: str) -> float | None:
    values = [value for _, value in run.column(name)]
    return sum(values) / len(values) if values else None


def _median(points: list[tuple[int, float]]) -> float | None:
    return float(np.median([value for _, value in points])) if points else None


def _percent(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1%}" if abs(value) < 0.1 else f"{value:.0%}"


def _times(n: int) -> str:
    return "once" if n == 1 else f"{n} times"


def in_bytes(value: float | None) -> str:
    """Bytes for people."""
    return (
        "not measured"
        if value is None
        else f"{value / 2**30:.2f} GiB"
        if value > 2**30
        else f"{value / 2**20:.0f} MiB"
    )


def _device(run: RunFiles) -> str:
    return str((run.manifest or {}).get("device") or "of this process")


def in_time(seconds: float | None) -> str:
    """Seconds for people."""
    if seconds is None:
        return "not measured"
    hours, rest = divmod(round(seconds), 3600)
    return (
        f"{hours} h {rest // 60} min"
        if hours
        else f"{rest // 60} min {rest % 60} s"
        if rest >= 60
        else f"{rest} s"
    )
