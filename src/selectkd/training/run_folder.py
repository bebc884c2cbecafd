"""A run folder: whose it is, who works in it, and whether a command means the run that is there.

run.json says what the run is made of: the recipe, key by key, and facts that a recipe does not show (the text behind a
path, the tokenizer, the revisions that were loaded). Two commands mean the same run where both agree.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.data.durable import json_bytes, sealed, unsealed, write_plain, write_whole
from selectkd.data.sources import fingerprint_of
from selectkd.errors import ConfigError, IntegrityError, ResourceError, SelectKDError, abridged
from selectkd.objective.registry import did_you_mean
from selectkd.teachers.cache.origin import weights_checksum
from selectkd.teachers.cache.plan import CachePlan
from selectkd.teachers.model import ModelPlan
from selectkd.teachers.remote.plan import ServerPlan
from selectkd.teachers.several import SeveralPlan
from selectkd.training.checkpoint.folder import SUPERSEDED, Found, all_in, check, find, set_aside
from selectkd.training.counts import rank, ranks, total
from selectkd.training.run_lock import LOCK, locked

RUN, CHECKPOINTS, FINISHED, STOPPED = "run.json", "checkpoints", "manifest.json", "stopped.json"
FREE = (
    *(f"training.{key}" for key in ("output_dir", "save_every", "keep", "report_to", "report")),
    *(
        f"teacher.{key}"
        for key in ("timeout", "wait", "retries", "concurrency", "check_every", "ca", "api_key_env")
    ),
)
"""Keys that change nothing in what a step computes, so a run may go on with other values."""

FACTS = (
    *(
        "text",
        "heldout_text",
        "tokenizer",
        "teacher_weights",
        "student_weights",
        "ranks",
        "precision",
        "threads",
    ),
    "date",  # where the chat template asks for one
)
"""What a run is made of beside its recipe; known once its parts are loaded."""

MOST_SHOWN = 3
_ABSENT = object()


def check_output_dir(folder: Path) -> bool:
    """Whether ``folder`` holds a run of ours to go on with; False where it is absent or empty.

    ConfigError where it is a file, cannot be written, or holds anything else.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(
                f"training.output_dir = {folder} is a file. Name a folder that is new or empty."
            )
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        there = {name for name in names if name != LOCK and not name.startswith(f".{RUN}.partial")}
        above = folder
        while not above.exists():
            above = above.parent
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ConfigError(
            f"training.output_dir = {str(folder)[:200]} cannot be written: {error.strerror}. Name another folder."
        ) from error
    ours = RUN in there
    if there and not ours:
        what = "holds another run" if FINISHED in there else "is not empty"
        raise ConfigError(f"training.output_dir = {folder} {what}. Name a new folder, or delete this one.")
    return ours


@dataclass
class Claim:
    """A run folder held for this process. fresh: nothing was in it. opened: the checkpoint to go on from; by_name where
    the user named it. run: what run.json says. warnings: such as checkpoints that were damaged.
    """

    folder: Path
    fresh: bool
    run: dict[str, Any]
    opened: Found | None = None
    opened_by_name: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def hash(self) -> str:
        """As of ``hash_of``."""
        return hash_of(self.run)

    @contextmanager
    def threads(self, allowed: Sequence[str]) -> Iterator[None]:
        """The number of threads the run began with, on which the last bits of sums depend, while the context lasts."""
        before, begun = torch.get_num_threads(), self.run.get("threads")
        if begun is not None and "threads" not in allowed:
            torch.set_num_threads(begun)
        try:
            yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def settle(self, wanted: Mapping[str, Any], allowed: Sequence[str]) -> None:
        """Compares the run with what was found when its parts were loaded, and writes run.json.

        ConfigError where a fact (text, tokenizer, weights) is another one.
        """
        if not self.fresh:
            stored = {"threads": wanted["threads"], **self.run}  # older versions did not note it
            check_same(stored, wanted, allowed, where=f"training.output_dir = {self.folder}")
        if rank() == 0 and self.run != wanted:
            write_run(self.folder, wanted)
        self.run, self.fresh = dict(wanted), False


@contextmanager
def claimed(folder: Path, recipe: Any, *, resume: str, allowed: Sequence[str]) -> Iterator[Claim]:
    """The run folder of a recipe, held while the context lasts, and the checkpoint the run goes on from.

    resume: as in ``train``. ConfigError for a folder that cannot be used, is in use or holds another run;
    IntegrityError for a damaged checkpoint that was named. Reads no weights.
    """
    with ExitStack() as held:
        claim: Claim | None = None
        if rank() == 0:
            claim = _claim(folder, recipe, resume, allowed, held)
        total([0])  # rank 0 has cleared up
        if claim is None:
            claim = _claim(folder, recipe, resume, allowed, None)
        total([0])  # all have read run.json
        try:
            yield claim
        finally:
            if claim.fresh and rank() == 0:
                _leave(folder)


def _claim(folder: Path, recipe: Any, resume: str, allowed: Sequence[str], held: ExitStack | None) -> Claim:
    ours = check_output_dir(folder)
    if ours and resume == "never":
        raise ConfigError(
            f"training.output_dir = {folder} holds a run, and --resume never takes a new folder only. "
            "Name another one, or leave --resume out."
        )
    stored = same_recipe(folder, recipe, allowed) if ours else {}
    folder.mkdir(parents=True, exist_ok=True)
    if held is not None:
        held.enter_context(locked(folder))
    claim = Claim(folder, not ours, stored)
    if resume in ("auto", "never"):
        claim.opened, claim.warnings = find(folder / CHECKPOINTS)
    else:
        claim.opened, claim.opened_by_name = _named(Path(resume), folder / CHECKPOINTS), True
    return claim


def _leave(folder: Path) -> None:
    """Takes away a folder that was claimed for a run that did not come to be."""
    if {path.name for path in folder.iterdir()} <= {LOCK}:
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _named(path: Path, checkpoints: Path) -> Found:
    """The checkpoint that a user names; later ones of the same run are set aside, being another future."""
    if not path.is_dir():
        near = [each.name for each in all_in(checkpoints)]
        raise ConfigError(
            f"--resume {path} is no folder. Use auto, never, or one of {', '.join(near[:4]) or 'no checkpoints'}."
        )
    found = Found(path, check(path))
    if path.resolve().parent == checkpoints.resolve() and rank() == 0:
        for other in all_in(checkpoints):
            if other.name > path.name:
                set_aside(other, SUPERSEDED)
    return found


def facts(assembly: Any) -> dict[str, Any]:
    """What a recipe does not show of a run: its text, tokenizer, weights and ranks (FACTS), by fingerprint."""
    found = {
        "text": fingerprint_of(assembly.sources),
        "heldout_text": assembly.heldout.examples.fingerprint,
        "tokenizer": tokenizer_fingerprint(assembly.tokenizer),
        "teacher_weights": _weights(assembly.teacher_plan),
        "student_weights": assembly.student_revision or assembly.kept or weights_checksum(assembly.student),
        "ranks": ranks(),
        "precision": assembly.precision.name,
        "threads": torch.get_num_threads(),
    }
    if assembly.text is not None and assembly.text.template.dated:
        found["date"] = assembly.text.template.moment
    assert set(found) <= set(FACTS)
    return found


def date_of(folder: Path) -> str | None:
    """The date that the chat template of the run in ``folder`` is given; None without a run, or where it asks none."""
    return read_run(folder).get("date") if (folder / RUN).is_file() else None


def _weights(plan: Any) -> Any:
    """The commit, checksum or fingerprint a teacher's weights are known by; None where its plan knows none."""
    if isinstance(plan, SeveralPlan):
        return [_weights(each) for each in plan.plans]
    if isinstance(plan, ServerPlan):
        return None if plan.fingerprint is None else plan.fingerprint.noted()
    if isinstance(plan, CachePlan):
        teacher = plan.index["teacher"]
        return {key: teacher.get(key) for key in ("revision", "weights", "fingerprint")}
    if plan.revision is None and isinstance(plan, ModelPlan):
        return weights_checksum(plan.loaded().model)
    return plan.revision


def same_servers(plan: Any, noted: Any, allowed: Sequence[str] = ()) -> None:
    """TeacherError where a server of ``plan`` has another model than the run was begun with: ``noted`` is the run's
    ``teacher_weights``. Where it has the same, the run's own fingerprint goes on being the one to compare with.
    """
    if "teacher_weights" in allowed:
        return
    if isinstance(plan, SeveralPlan) and isinstance(noted, list) and len(noted) == len(plan.plans):
        for each, one in zip(plan.plans, noted, strict=True):
            same_servers(each, one)
    elif isinstance(plan, ServerPlan):
        plan.went_on(noted)


@contextmanager
def noting_errors(folder: Path) -> Iterator[None]:
    """Around a run: an error that ends it is noted in stopped.json, until a command takes the run up again."""
    if rank() == 0:
        (folder / STOPPED).unlink(missing_ok=True)
    try:
        yield
    except SelectKDError as error:
        if rank() == 0 and (folder / RUN).is_file():
            noted = {"error": str(error), "kind": type(error).__name__, "exit_code": error.exit_code}
            with suppress(ResourceError):  # a full disk keeps its own message
                write_plain(folder / STOPPED, json_bytes({**noted, "time": round(time.time(), 3)}))
        raise


def identity(recipe: Any, facts: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a run is made of, one level deep: ``objective.beta``: .01, ..., and facts; FREE keys left out."""
    return {**flat(recipe.model_dump(mode="json")), **(facts or {})}


def same_recipe(folder: Path, recipe: Any, allowed: Sequence[str] = ()) -> dict[str, Any]:
    """What run.json says; ConfigError where its recipe is another one."""
    stored = at_defaults(read_run(folder), recipe)
    same = {key: value for key, value in stored.items() if key not in FACTS}
    names = [name for name in allowed if name not in FACTS]
    check_same(same, identity(recipe), names, where=f"training.output_dir = {folder}")
    return stored


def hash_of(run: Mapping[str, Any]) -> str:
    """The xxh3-128 of what a run is made of, which its checkpoints name."""
    return xxhash.xxh3_128(json_bytes(dict(run))).hexdigest()


def at_defaults(stored: Mapping[str, Any], recipe: Any) -> dict[str, Any]:
    """What a run is made of, with the keys that its version did not have yet where the recipe leaves them out."""
    chosen = flat(recipe.model_dump(mode="json", exclude_defaults=True))
    newer = {key: value for key, value in identity(recipe).items() if key not in chosen}
    return {**newer, **stored}


def read_run(folder: Path) -> dict[str, Any]:
    """run.json; IntegrityError where it is damaged."""
    content = unsealed((folder / RUN).read_bytes())
    if content is None:
        raise IntegrityError(
            f"{folder / RUN} is damaged, so the two runs cannot be compared. "
            f"Name a checkpoint and a new folder: --resume {folder / CHECKPOINTS}/STEP --set training.output_dir=NEW."
        )
    return content["run"]


def write_run(folder: Path, run: Mapping[str, Any]) -> None:
    """Writes run.json, whole or not at all."""
    write_whole(folder / RUN, sealed({"format": 1, "run": dict(run)}))


def check_same(
    stored: Mapping[str, Any],
    wanted: Mapping[str, Any],
    allowed: Sequence[str],
    *,
    where: str,
    remedy: str = "Name a new training.output_dir, or allow it: --allow-change {key}",
) -> None:
    """ConfigError with a line for each key of a run that differs and is not allowed to by name.

    A name allows its key and all below it: ``objective`` allows ``objective.beta``. remedy: the last line of the
    message, {key} being the first key that differs.
    """
    keys = sorted({*stored, *wanted})
    for name in allowed:
        if not any(_below(key, name) for key in keys):
            raise ConfigError(
                f"a change of {name} is allowed, and there is no such key.{did_you_mean(name, keys)}"
            )
    differ = [
        key
        for key in keys
        if stored.get(key, _ABSENT) != wanted.get(key, _ABSENT)
        and not any(_below(key, name) for name in allowed)
    ]
    if not differ:
        return
    lines = [
        f"  {key}: {_shown(stored.get(key, _ABSENT))} in the run, {_shown(wanted.get(key, _ABSENT))} now"
        for key in differ[:MOST_SHOWN]
    ]
    if len(differ) > MOST_SHOWN:
        lines[-1] = f"  and {len(differ) - MOST_SHOWN + 1} more: {', '.join(differ[MOST_SHOWN - 1 :])}"
    raise ConfigError(f"{where} is another run:\n" + "\n".join([*lines, remedy.replace("{key}", differ[0])]))


def _below(key: str, name: str) -> bool:
    return key == name or key.startswith(f"{name}.")


def flat(value: Any, under: str = "") -> dict[str, Any]:
    """A nest of mappings one level deep, ``a.b: value``, without FREE keys.

    >>> flat({"training": {"seed": 1, "output_dir": "runs/a"}})
    {'training.seed': 1}
    """
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, each in value.items():
            found |= flat(each, f"{under}.{key}" if under else str(key))
        return found
    if isinstance(value, list) and value:
        return flat(dict(enumerate(value)), under)
    return {} if under in FREE else {under: value}


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else abridged(json.dumps(value, ensure_ascii=True))
