"""Where a page's numbers come from: the recipe with defaults marked, versions, commands, and what is missing."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from selectkd.report.escapes import shortened
from selectkd.report.results import Results
from selectkd.report.run_files import RunFiles

LONGEST = 300


def recipe_rows(run: RunFiles) -> list[tuple[str, str, bool]]:
    """(key, value, whether it is the default) of every key of the run's recipe."""
    config = (run.manifest or {}).get("config")
    if not isinstance(config, Mapping):
        return [(key, _shown(value), False) for key, value in sorted(run.settings.items())]
    chosen = _chosen(config)
    return [
        (key, _shown(value), chosen is not None and key not in chosen) for key, value in _flat(config).items()
    ]


def _chosen(config: Mapping[str, Any]) -> set[str] | None:
    """The keys that differ from the defaults; None where this version does not read the recipe."""
    from selectkd.config.schema import Recipe

    try:
        checked = Recipe.model_validate(config)
    except ValueError:
        return None
    return set(_flat(checked.model_dump(mode="json", exclude_defaults=True)))


def _flat(value: Any, under: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, each in value.items():
            found |= _flat(each, f"{under}.{key}" if under else str(key))
        return found
    return {under: value}


def facts(run: RunFiles) -> list[tuple[str, str]]:
    """Versions, hashes, seeds and sizes, by name."""
    manifest = run.manifest or {}
    found = {f"version of {name}": value for name, value in (manifest.get("versions") or {}).items()}
    for key in ("device", "precision", "ranks", "seed", "steps", "tokens", "written"):
        found[key] = manifest.get(key)
    for key in ("teacher", "student", "data", "tokenizer"):
        found |= _flat(manifest.get(key) or {}, key)
    hashes = ("text", "heldout_text", "tokenizer", "teacher_weights", "student_weights", "threads", "date")
    found |= {f"run.json {key}": run.settings.get(key) for key in hashes}
    return [(key, _shown(value)) for key, value in found.items() if value not in (None, "", [], {})]


def commands(run: RunFiles, kinds: set[str]) -> list[tuple[str, str]]:
    """(what, the command that measures it) of everything on the page."""
    folder = shlex.quote(str(run.folder))
    every = [
        ("training, held-out measures, probe", f"selectkd train RECIPE --set training.output_dir={folder}"),
        ("this page", f"selectkd report {folder}"),
    ]
    return every + [(what, command) for kind, what, command in _asked(folder) if kind in kinds]


def missing(run: RunFiles, results: Results) -> list[tuple[str, str]]:
    """(what was not measured, how it would be)."""
    found = []
    if not run.held_out:
        found.append(("held-out KL and perplexity", "data.evaluation in the recipe"))
    if run.looks is None:
        found.append(("tokens of the probe", "training.probe_samples above 0, with this version of selectkd"))
    if not run.clock("peak_bytes"):
        found.append(("peak memory", "a run of this version of selectkd"))
    return found + [
        (what, command)
        for kind, what, command in _asked(shlex.quote(str(run.folder)))
        if kind not in results.kinds and kind != "texts"  # no command makes them of a run that is over
    ]


def _asked(folder: str) -> Sequence[tuple[str, str, str]]:
    at = f"{folder}/NAME.json"  # the folder is quoted for a shell
    return (
        ("eval", "evaluation with intervals", f"selectkd eval {folder} --json {at}"),
        ("texts", "answers of teacher and student side by side", "selectkd demo"),
        (
            "speculate",
            "acceptance and speed-up as a draft",
            f"selectkd study speculate --draft {folder} --target TEACHER --json {at}",
        ),
        ("panel", "gates on the same rows", f"selectkd study panel RECIPE --json {at}"),
        ("compare", "whether the gate helps", f"selectkd study compare RECIPE --controls --json {at}"),
        ("dynamics", "how acceptance grew", f"selectkd study dynamics {folder} --json {at}"),
        ("landscape", "how flat the loss is", f"selectkd study landscape {folder} --json {at}"),
    )


def differing(runs: Sequence[RunFiles]) -> list[tuple[str, list[str]]]:
    """(key, its value in each run) of the recipe keys and facts that are not the same in all runs."""
    noted = all(
        run.settings for run in runs
    )  # run.json is there from the first step on, the manifest at the end alone
    every = [run.settings if noted else _flat((run.manifest or {}).get("config") or {}) for run in runs]
    keys = dict.fromkeys(key for one in every for key in one)
    return [
        (key, [_shown(one.get(key)) for one in every])
        for key in keys
        if len({json.dumps(one.get(key), sort_keys=True, default=str) for one in every}) > 1
        and key != "training.output_dir"
    ]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shortened(text, LONGEST, keep="")
