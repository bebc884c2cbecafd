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
from functools import lru_cache
from pathlib import Path
from typing import Any

from selectkd.config.load import recipe_from
from selectkd.config.study import HIGHER_IS_BETTER, Study
from selectkd.data.durable import checksum
from selectkd.errors import ConfigError
from selectkd.evals.studies.arms import RANDOM, possible_controls
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
    """The file's arms, each gated one followed by its controls. One that ranks rows has no matched_position, which
    deals out the verdicts of rows; one whose weights may exceed 1 has matched_shuffle for matched_random.

    ConfigError names the arm whose gate cannot be made.
    """
    found = []
    for name in study.arms:
        found.append(Arm(name, name))
        gate, beta = gate_of(study, name)
        if gate["name"] == "always" or beta == 1.0 or gate["name"].startswith("matched_"):
            continue
        try:
            possible = possible_controls(gate) if study.controls else {}
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


def gate_of(study: Study, name: str) -> tuple[dict[str, Any], Any]:
    """(verifier or selector, beta) of an arm of the file."""
    objective = study.recipe_of(name).objective
    return objective.gate, objective.beta


def values_of(study: Study, job: Job, rate: float | None) -> dict[str, Any]:
    """The values of a job's recipe. rate: the acceptance of the gated run that a random control repeats."""
    values = copy.deepcopy(study.values(job.arm.of, job.seed))
    if job.learning_rate is not None:
        values["training"]["learning_rate"] = job.learning_rate
    if job.arm.control is not None:
        gate, _ = gate_of(study, job.arm.of)
        objective = study.recipe_of(job.arm.of).model_dump(mode="json", exclude_unset=True)["objective"]
        random = job.arm.control == RANDOM
        verifier = {"name": job.arm.control, **({"rate": rate} if random else {"of": gate})}
        values.pop("selection", None)
        kept = {k: v for k, v in (values.get("objective") or {}).items() if k not in ("verifier", "selector")}
        values["objective"] = {**kept, "verifier": verifier, "beta": objective.get("beta", 0.01)}
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
    """Whether a job has its row already: of this recipe, of the files as they are, and of a run that did not fail. The
    files of a row do not matter where a model is not there to compare with."""
    row = rows.get(job.key, {})
    read = files_read(values)
    same = read is None or row.get("files", read) == read
    return row.get("recipe") == mark_of(study, values) and same and not row.get("error")


def mark_of(study: Study, values: Mapping[str, Any]) -> str:
    """The checksum of a job's recipe and of what is measured, 16 hexadecimal digits."""
    text = json.dumps([values, study.asked()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def files_read(values: Mapping[str, Any]) -> str | None:
    """The checksum, 16 hexadecimal digits, of the weights and the text in local files that a recipe names: the same
    names can stand for models that were made again. None where the folder of a model is not there."""
    recipe = recipe_from(copy.deepcopy(dict(values)))
    names = [*recipe.models, *(getattr(one, "model", None) for one in recipe.teachers)]
    folders = [Path(name).expanduser() for name in names if name]
    if any(str(folder).startswith((".", "/")) and not folder.is_dir() for folder in folders):
        return None
    found = {file for folder in folders for file in folder.glob("*.safetensors")}
    data = recipe.data.model_dump(mode="json")
    for source in [*data["sources"], data["evaluation"]]:
        if isinstance(source, dict) and source.get("path") and Path(source["path"]).expanduser().is_file():
            found.add(Path(source["path"]).expanduser())
    sums = [_checksum(file, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(found)]
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def _checksum(file: Path, size: int, changed: int) -> str:
    return checksum(file)


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
    try:
        rate = rate_for(study, rows, job) if job.arm.control == RANDOM else None
    except ConfigError:
        return False
    return stands(study, rows, job, values_of(study, job, rate))
