"""What a run came to: as an object, as the student's card, as the manifest, and read again from a finished folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from selectkd.config.departures import departures
from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.data.sources import fingerprint_of
from selectkd.errors import IntegrityError
from selectkd.training.assembly import Assembly
from selectkd.training.counts import ranks
from selectkd.training.heldout.evaluation import Evaluation
from selectkd.training.ledger import Ledger
from selectkd.training.record.card import Facts
from selectkd.training.record.manifest import device_name, versions
from selectkd.training.run_folder import FINISHED, Claim, at_defaults, flat, identity


@dataclass(frozen=True)
class RunResult:
    """What a run came to. before, after: held-out measures, None without held-out text. kept: layers of a cut
    student. resumed_from: the step it went on from. unrounded: KL before and after, of a student that
    rounds its weights, as if it did not.
    """

    run_dir: Path
    before: Evaluation | None
    after: Evaluation | None
    kept: list[int] | None
    steps: int
    best_step: int
    stopped_early: bool
    skipped: int
    seconds: float
    warnings: list[str] = field(default_factory=list)
    resumed_from: int | None = None
    unrounded: dict[str, float] = field(default_factory=dict)


@dataclass
class Origin:
    """Where a run's student came from, and the warnings at its start: a part of its checkpoints."""

    kept: list[int] | None
    cut: dict[str, Any] | None
    warnings: list[str]

    def state_dict(self) -> dict[str, Any]:
        return {"kept": self.kept, "cut": self.cut, "warnings": self.warnings}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kept, self.cut, self.warnings = state["kept"], state["cut"], state["warnings"]


def cut_of(assembly: Assembly) -> dict[str, Any] | None:
    return (
        None
        if assembly.cut is None
        else {"kept": assembly.kept, "choose": assembly.cut.choose, "kl": assembly.cut.kl}
    )


def finished_run(folder: Path, recipe: Any, claim: Claim) -> RunResult | None:
    """What a finished run of this very recipe came to; None where the run is not there or not over."""
    path = folder / FINISHED
    if claim.fresh or not path.is_file():
        return None
    if claim.opened_by_name:
        path.unlink()  # the run goes on, so this says nothing any more
        return None
    try:
        return _read(folder, json.loads(path.read_bytes()), recipe)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it, and the run is finished again from its "
            "newest checkpoint."
        ) from None


def _read(folder: Path, content: dict[str, Any], recipe: Any) -> RunResult | None:
    if at_defaults(flat(content["config"]), recipe) != identity(recipe):
        (folder / FINISHED).unlink()  # the run goes on, so this says nothing any more
        return None
    measures = {
        name: None if content[name] is None else Evaluation(**content[name]) for name in ("before", "after")
    }
    cut = content["student"]["cut"]
    return RunResult(
        run_dir=folder,
        before=measures["before"],
        after=measures["after"],
        kept=None if cut is None else cut["kept"],
        **{
            name: content[name]
            for name in ("steps", "best_step", "stopped_early", "skipped", "seconds", "warnings")
        },
        resumed_from=content["steps"],
        unrounded=_unrounded(content["student"].get("rounding")),
    )


def _unrounded(rounding: dict[str, Any] | None) -> dict[str, float]:
    return {} if rounding is None else {when: one["unrounded"] for when, one in rounding["kl"].items()}


def _plain(spec: Any) -> Any:
    return spec.model_dump(exclude_none=True) if isinstance(spec, BaseModel) else spec


def facts_of(recipe: Any, manifest: Mapping[str, Any]) -> Facts:
    """What the card of a run says, from its recipe and its manifest."""
    objective = _plain(recipe.objective)
    method = {key: value for key, value in objective.items() if value not in (None, [], ())}
    method["lora" if recipe.training.lora is not None else "fine-tuning"] = (
        _plain(recipe.training.lora) or "full"
    )
    if recipe.training.fake_quantization is not None:
        method["fake_quantization"] = _plain(recipe.training.fake_quantization)
    if recipe.student.quantization is not None:
        method["quantization"] = _plain(recipe.student.quantization)
    if recipe.method is not None:
        overridden = {key: value for key, (_, value) in departures(recipe).items()}
        method = {"method": recipe.method, "overridden": overridden, **method}
    return Facts(
        teacher=manifest["teacher"]["source"],
        student=manifest["student"]["source"],
        data=manifest["data"]["streams"],
        method=method,
        before=manifest["before"] or {},
        after=manifest["after"] or {},
        steps=manifest["steps"],
        tokens=manifest["tokens"],
    )


def _rounding(recipe: Any, result: RunResult) -> dict[str, Any] | None:
    """How the student's weights are rounded, and its held-out KL with and without that, before training and after."""
    scheme = recipe.training.fake_quantization
    if scheme is None:
        return None
    measured = {"before": result.before, "after": result.after}
    kl = {
        when: {"rounded": one.kl, "unrounded": result.unrounded.get(when)}
        for when, one in measured.items()
        if one is not None
    }
    return {**_plain(scheme), "kl": kl}


def manifest_of(
    recipe: Any, assembly: Assembly, result: RunResult, ledger: Ledger, device: torch.device, origin: Origin
) -> dict[str, Any]:
    return {
        "config": recipe.model_dump(mode="json"),
        "overridden": {
            key: {"method": methods, "recipe": value} for key, (methods, value) in departures(recipe).items()
        },
        "versions": versions(),
        "device": device_name(device),
        "precision": assembly.precision.name,
        "ranks": ranks(),
        "seed": recipe.training.seed,
        "teacher": {"source": assembly.teacher_plan.source, "revision": assembly.teacher_plan.revision},
        "student": {
            "source": assembly.student_source,
            "revision": assembly.student_revision,
            "cut": origin.cut,
            "quantization": _plain(recipe.student.quantization),
            "rounding": _rounding(recipe, result),
        },
        "data": {
            "fingerprint": fingerprint_of(assembly.sources),
            "samples": sum(len(source) for source in assembly.sources),
            "sources": [
                {"name": s.name, "summary": s.summary, "counts": dict(s.counts)} for s in assembly.sources
            ],
            "heldout_samples": len(assembly.heldout.examples),
            "streams": list(assembly.streams),
        },
        "tokenizer": {"fingerprint": tokenizer_fingerprint(assembly.tokenizer)},
        "steps": result.steps,
        "best_step": result.best_step,
        "stopped_early": result.stopped_early,
        "skipped": result.skipped,
        "skipped_steps": ledger.left_out,
        "spikes": ledger.spikes.steps,
        "tokens": ledger.tokens,
        "seconds": round(result.seconds, 3),
        "tar": {"before": result.before and result.before.tar, "after": result.after and result.after.tar},
        "before": None if result.before is None else result.before.as_dict(),
        "after": None if result.after is None else result.after.as_dict(),
        "warnings": result.warnings,
    }
