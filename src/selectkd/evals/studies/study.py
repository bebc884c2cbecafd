"""A study run: learning rates chosen on a seed of their own, then every arm and its controls with every seed."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selectkd.config.study import HIGHER_IS_BETTER, Study
from selectkd.errors import ConfigError
from selectkd.evals.studies.arms import RANDOM, controls_of
from selectkd.evals.studies.files import files_read, same_files
from selectkd.evals.studies.one_run import run_apart
from selectkd.evals.studies.rows import Key, Row, append_row, number, rate_of_others, read_rows

OnRow = Callable[[Row], None]
OF_SEQUENCES = ("held_out_kl_of", "held_out_tokens_of")
"""Lists that a study's statistics, which are over seeds, do not read."""


@dataclass(frozen=True)
class Arm:
    """One way to train: ``of`` and ``control`` name the gated arm that it controls for and how, None for an arm of
    the file."""

    name: str
    of: str
    control: str | None = None


@dataclass(frozen=True)
class Job:
    """One run of an arm; learning_rate None: the recipe's."""

    arm: Arm
    seed: int
    learning_rate: float | None

    @property
    def key(self) -> Key:
        return (self.arm.name, self.seed, self.learning_rate)


def arms_of(study: Study) -> list[Arm]:
    """The file's arms, each gated one followed by its controls, of which ``controls_of`` says what it can have.

    ConfigError names the arm whose gate cannot be made or has no control.
    """
    found = []
    for name in study.arms:
        found.append(Arm(name, name))
        try:
            possible = controls_of(study.recipe_of(name)) if study.controls else {}
        except ConfigError as error:
            raise ConfigError(f"arms.{name}: {error}") from None
        for control in study.controls:
            if control in possible:
                found.append(Arm(f"{name}/{possible[control]}", name, possible[control]))
    return found


def check_names(study: Study) -> None:
    """ConfigError for a claim or a trend of a control that its arm does not have."""
    known = [arm.name for arm in arms_of(study)]
    named = [name for claim in study.claims for name in (claim.first, claim.second)]
    for name in [*named, *(name for trend in study.trends for name in trend.of)]:
        if name not in known:
            own = [one for one in known if one.startswith(f"{name.partition('/')[0]}/")]
            raise ConfigError(
                f"claims or trends name {name!r}, a control that this arm does not have. It has: "
                f"{', '.join(own) or 'none'}."
            )


def values_of(study: Study, job: Job, rate: float | None) -> dict[str, Any]:
    """The values of a job's recipe. rate: the acceptance of the gated run that a random control repeats. Of a verifier
    and a selector beside it a control replaces the verifier alone."""
    values = copy.deepcopy(study.values(job.arm.of, job.seed))
    if job.learning_rate is not None:
        values["training"]["learning_rate"] = job.learning_rate
    if job.arm.control is not None:
        recipe = study.recipe_of(job.arm.of)
        gates, objective = recipe.objective, recipe.model_dump(mode="json", exclude_unset=True)["objective"]
        random = job.arm.control == RANDOM
        verifier = {"name": job.arm.control, **({"rate": rate} if random else {"of": gates.gate})}
        values.pop("selection", None)
        kept = {k: v for k, v in (values.get("objective") or {}).items() if k not in ("verifier", "selector")}
        beside = {"selector": gates.selector} if gates.verifier and gates.selector else {}
        values["objective"] = {**kept, **beside, "verifier": verifier, "beta": objective.get("beta", 0.01)}
    return values


def rate_for(study: Study, rows: Mapping[Key, Row], job: Job) -> float:
    """The rate of a random control, from the row of the gated run with its seed; ConfigError where it has none."""
    chosen = chosen_rates(study, rows).get(job.arm.of)
    at = job.learning_rate if job.seed == study.tuning_seed and study.learning_rates else chosen
    objective = study.recipe_of(job.arm.of).objective
    row = rows.get((job.arm.of, job.seed, at), {})
    return rate_of_others(row, always_accept=bool(objective.always_accept))


def waves(study: Study, rows: Mapping[Key, Row]) -> Any:
    """Jobs in groups whose members do not wait for each other; ``rows`` grows between them."""
    arms = arms_of(study)
    layers = [[arm for arm in arms if (arm.control is not None) == later] for later in (False, True)]
    for layer in layers if study.learning_rates else ():
        yield [Job(arm, study.tuning_seed, rate) for arm in layer for rate in study.learning_rates]
    for seed in study.seeds:
        for layer in layers:
            chosen = chosen_rates(study, rows)
            yield [Job(arm, seed, chosen[arm.name]) for arm in layer if arm.name in chosen]


def chosen_rates(study: Study, rows: Mapping[Key, Row]) -> dict[str, float | None]:
    """Each arm's learning rate, the best by study.tuned_by (else the outcome) on the tuning seed; no arm whose runs
    there all failed."""
    found: dict[str, float | None] = {}
    measure = study.tuned_by or study.outcome
    sign = -1.0 if measure in HIGHER_IS_BETTER else 1.0
    for arm in arms_of(study):
        if not study.learning_rates:
            found[arm.name] = None
            continue
        tried = [
            (sign * value, rate)
            for rate in study.learning_rates
            if (value := number(rows.get((arm.name, study.tuning_seed, rate)), measure)) is not None
        ]
        if tried:
            found[arm.name] = min(tried)[1]
    return found


def run_study(
    study: Study,
    file: Path,
    folder: Path,
    *,
    workers: int = 1,
    device: str = "auto",
    on_row: OnRow | None = None,
) -> dict[Key, Row]:
    """Runs what has no row in ``file`` yet, ``workers`` runs at once, each in a process of its own, and adds a row as
    each ends. A row of another recipe of the arm, of other weights or text in its files, or of a run that failed, is
    run again.

    folder: of the run folders, which go once their row is there. Raises ConfigError for rows that cannot be read, and
    for a claim of a control that is not run.
    """
    check_names(study)
    rows, lock = read_rows(file), threading.Lock()

    def work(job: Job) -> None:
        rate, row, read = None, None, None
        if job.arm.control == RANDOM:
            try:
                rate = rate_for(study, rows, job)
            except ConfigError as error:
                row = {"error": str(error)}
        values = values_of(study, job, rate)
        started = time.perf_counter()
        if row is None:
            if stands(study, rows, job, values):
                return
            if (read := files_read(values)) is None:
                raise ConfigError(
                    f"{job.arm.name}: the folder of one of its models is not there. Make it, or change the arm."
                )
            name = "-".join([job.arm.name.replace("/", "-"), str(job.seed), str(job.learning_rate)])
            row = finite(run_apart(values, folder / name, measures=study.asked(), device=device))
            shutil.rmtree(folder / name, ignore_errors=True)
            row = {key: value for key, value in row.items() if key not in OF_SEQUENCES}
        row = {
            "arm": job.arm.name, "seed": job.seed, "learning_rate": job.learning_rate, **row,
            "wall_seconds": round(time.perf_counter() - started, 2), "recipe": mark_of(study, values), "files": read,
        }  # fmt: skip
        with lock:
            rows[job.key] = row
            append_row(file, row)
            if on_row is not None:
                on_row(row)

    with ThreadPoolExecutor(workers) as pool:
        for wave in waves(study, rows):
            list(pool.map(work, wave))
    return rows


def stands(study: Study, rows: Mapping[Key, Row], job: Job, values: Mapping[str, Any]) -> bool:
    """Whether a job has its row already: of this recipe, of the files as they are, and of a run that did not fail."""
    row = rows.get(job.key, {})
    return row.get("recipe") == mark_of(study, values) and not row.get("error") and same_files(row, values)


def of_recipes(study: Study, rows: Mapping[Key, Row]) -> dict[Key, Row]:
    """The rows of the study as its file stands: without those of arms that it no longer has, of recipes that were
    changed since, and of controls whose rate is no longer that of the gated run. A run that failed stays, and so does
    a row that does not say its recipe."""
    arms = {arm.name: arm for arm in arms_of(study)}
    tuned = {(study.tuning_seed, rate) for rate in study.learning_rates}
    counted = {(seed, rate) for seed in study.seeds for rate in study.learning_rates or [None]}
    found: dict[Key, Row] = {}
    for wanted in (False, True):  # the rate of a random control is that of a row that is there
        for key, row in rows.items():
            arm = arms.get(key[0])
            if arm is None or (arm.control is not None) != wanted or key[1:] not in tuned | counted:
                continue
            job = Job(arm, key[1], key[2])
            values = _values_known(study, found, job)
            mark = None if values is None else mark_of(study, values)
            if row.get("error") or (mark is not None and row.get("recipe", mark) == mark):
                found[key] = row
    return {key: found[key] for key in rows if key in found}


def mark_of(study: Study, values: Mapping[str, Any]) -> str:
    """The checksum of a job's recipe and of what is measured, 16 hexadecimal digits."""
    text = json.dumps([values, study.asked()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def finite(row: Row) -> Row:
    """The row, or its error where a number of it is not finite: JSON has no word for one, and such a run says
    nothing."""
    wrong = [
        f"{name} is {value}"
        for name, value in row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return {"error": f"the run diverged: {', '.join(wrong)}"} if wrong else row


def planned(study: Study, rows: Mapping[Key, Row]) -> tuple[int, int, float | None]:
    """(runs of the study, runs whose row stands, seconds the rest may take at the mean of those; None before any)."""
    arms = {arm.name: arm for arm in arms_of(study)}
    total = len(arms) * (len(study.learning_rates) + len(study.seeds))
    jobs = [Job(arm, study.tuning_seed, rate) for arm in arms.values() for rate in study.learning_rates]
    jobs += [
        Job(arms[name], seed, rate)
        for name, rate in chosen_rates(study, rows).items()
        for seed in study.seeds
    ]
    good = [rows[job.key] for job in jobs if _is_done(study, rows, job)]
    if not good:
        return total, 0, None
    mean = sum(row["wall_seconds"] for row in good) / len(good)
    return total, len(good), mean * (total - len(good))


def _is_done(study: Study, rows: Mapping[Key, Row], job: Job) -> bool:
    values = _values_known(study, rows, job)
    return values is not None and stands(study, rows, job, values)


def _values_known(study: Study, rows: Mapping[Key, Row], job: Job) -> dict[str, Any] | None:
    """The values of a job's recipe; None for a random control whose rate the rows do not give."""
    try:
        rate = rate_for(study, rows, job) if job.arm.control == RANDOM else None
    except ConfigError:
        return None
    return values_of(study, job, rate)
