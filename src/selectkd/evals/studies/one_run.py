"""One run of a study, in a process of its own: its memory is its own, and so is its end."""

from __future__ import annotations

import json
import logging
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from selectkd.objective.plugins import Granted, grant, granted

Asked = str | Mapping[str, Any]
FIELDS = ("held_out_kl", "held_out_loss", "tar", "bite", "tokens_per_second", "peak_bytes")
"""What a row says of a run, beside what it is called; all None where the run failed."""


def run_apart(
    values: Mapping[str, Any],
    folder: Path,
    *,
    measures: Sequence[Asked] = (),
    keep: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """The row of one run, or {"error": ...} where it failed, be it by a signal.

    What is measured: held-out KL in nats a token, the loss of the text's own tokens in nats, and loss_before, what it
    was at step 0 (None where no look was taken there), TAR, bite and overlap at one verifier for all, training tokens a
    second, the peak of the process (of the accelerator where there is one), and ``measures`` of MEASURES, each a name
    or {name, **options}. keep: leave the student's weights in the run folder.
    device: as of ``use_device``.
    """
    context: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    if sys.platform == "linux":
        context.set_forkserver_preload(["selectkd.evals.studies.preloaded"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_child, args=(dict(values), str(folder), tuple(measures), keep, device, granted(), sender)
    )
    process.start()
    sender.close()
    try:
        row = receiver.recv()
    except EOFError:
        row = None
    finally:
        process.join()
        receiver.close()
    return row if row is not None else {"error": f"the run ended with exit code {process.exitcode}"}


def _child(
    values: dict[str, Any], folder: str, measures: Sequence[Asked], keep: bool, device: str, plugins: Granted,
    sender: Connection,
) -> None:  # fmt: skip
    from transformers.utils import logging as transformers_logging

    from selectkd.errors import SelectKDError

    threading.Thread(target=_end_with_parent, daemon=True).start()
    grant(plugins)
    transformers_logging.disable_progress_bar()
    logging.getLogger("selectkd").setLevel(logging.ERROR)  # what it warns of is in the row
    try:
        sender.send(measured(values, Path(folder), measures=measures, keep=keep, device=device))
    except (SelectKDError, OSError, MemoryError, RuntimeError, ValueError, ArithmeticError) as error:
        sender.send({"error": f"{type(error).__name__}: {error}".splitlines()[0]})
    finally:
        sender.close()


def _end_with_parent() -> None:
    """Ends this process when the one that asked for the run is gone, however that went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


def empty(folder: Path) -> None:
    """Takes away the rest of a run that never came to its row; ConfigError where a process works in it, or where
    the folder holds no run."""
    from selectkd.training.run_folder import check_output_dir
    from selectkd.training.run_lock import locked

    check_output_dir(folder)
    if folder.exists():
        with locked(folder):
            shutil.rmtree(folder)


def measured(
    values: dict[str, Any],
    folder: Path,
    *,
    measures: Sequence[Asked] = (),
    keep: bool = False,
    device: str = "auto",
) -> dict[str, Any]:
    """Trains the recipe of ``values`` in ``folder``, which is emptied first, and measures its student."""
    from selectkd.config import recipe_from
    from selectkd.evals.studies.measures import MEASURES
    from selectkd.models.devices import peak_memory
    from selectkd.models.forward import evaluating
    from selectkd.training.run import train

    empty(folder)
    values["training"] = {**values["training"], "output_dir": str(folder)}
    recipe = recipe_from(values)
    kept: list[Any] = []
    started = time.perf_counter()
    result = train(recipe, on_assembled=kept.append, device=device)
    seconds = time.perf_counter() - started
    with evaluating(kept[0].student):
        held = held_out(kept[0], recipe.training.seed)
        for one in measures:
            options = {} if isinstance(one, str) else dict(one)
            name = one if isinstance(one, str) else options.pop("name")
            held |= MEASURES[name](kept[0], recipe, **options)
    log, clock = _lines(folder / "metrics.jsonl"), _lines(folder / "timings.jsonl")
    lines = [line for line in log if "tokens_per_second" in line]
    speed = {line["step"]: line["tokens_per_second"] for line in clock if "tokens_per_second" in line}
    tokens = int(lines[-1]["tokens"])
    training = sum(
        (line["tokens"] - before) / speed[line["step"]]
        for line, before in zip(lines, [0, *(line["tokens"] for line in lines)], strict=False)
        if speed[line["step"]]
    )
    if not keep:
        for heavy in ("student", "checkpoints"):
            shutil.rmtree(folder / heavy, ignore_errors=True)
    on = next(kept[0].student.parameters()).device
    curve, before = curve_of([(line["step"], line["evaluation"]) for line in log if "evaluation" in line])
    return {
        **held,
        "loss_before": before,
        "tokens_per_second": tokens / training if training else None,
        "peak_bytes": peak_memory(on),
        "tokens": tokens,
        "steps": result.steps,
        "skipped": result.skipped,
        "seconds": round(seconds, 3),
        "process_seconds": round(time.process_time(), 3),
        "warnings": result.warnings,
        "acceptance": _mean(lines, "acceptance"),
        **_always_accepted(recipe, lines),
        "mean_weight": _mean(lines, "weight"),
        "curve": curve,
    }


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def curve_of(looks: Sequence[tuple[int, Mapping[str, Any]]]) -> tuple[list[list[Any]], float | None]:
    """([step, KL, TAR] of each look at held-out text, the loss at step 0 in nats); None for what was not finite, which
    metrics.jsonl has as null, and for the loss where no look was taken there."""
    curve = [
        [step, *(None if look[name] is None else round(look[name], 5) for name in ("kl", "tar"))]
        for step, look in looks
    ]
    first = looks[0][1]["perplexity"] if looks and looks[0][0] == 0 else None
    return curve, None if first is None else math.log(first)


def held_out(assembly: Any, seed: int) -> dict[str, Any]:
    """The held-out measures of an assembled run's student, with the KL of each sequence; one verifier for every arm."""
    from selectkd.errors import ConfigError
    from selectkd.evals.own_text import ONE_VERIFIER
    from selectkd.training.heldout.evaluation import evaluate_each

    if not assembly.heldout:
        raise ConfigError("a comparison needs held-out text; set data.evaluation to {path: ...} or a share.")
    each = evaluate_each(
        assembly.student, assembly.teacher, assembly.heldout, ONE_VERIFIER, seed=seed, streams=assembly.streams,
        precision=assembly.precision,
    )  # fmt: skip
    tokens = sum(one.tokens for one in each)

    def mean(value: Any) -> float:
        return sum(value(one) * one.tokens for one in each) / tokens

    return {
        "held_out_kl": mean(lambda one: one.kl),
        "held_out_loss": mean(lambda one: math.log(one.perplexity)),
        "tar": sum(one.tar for one in each) / len(each),
        "bite": _bite(each),
        "overlap": mean(lambda one: one.overlap),
        "held_out_kl_of": [one.kl for one in each],
        "held_out_tokens_of": [one.tokens for one in each],
    }


def _bite(each: list[Any]) -> float:
    whole = sum(one.kl * one.tokens for one in each)
    return sum(one.bite * one.kl * one.tokens for one in each) / whole if whole else 0.0


def _always_accepted(recipe: Any, lines: list[dict[str, Any]]) -> dict[str, float | None]:
    """The mean share of tokens that ``always_accept`` accepts, over the lines that acceptance is the mean of; nothing
    where the recipe names no tokens."""
    shares = [
        {**line, "share": line.get("always_accepted", 0.0) if line.get("acceptance") is not None else None}
        for line in lines
    ]
    mean = _mean(shares, "share") if recipe.objective.always_accept else None
    return {} if mean is None else {"always_accepted": mean}


def _mean(lines: list[dict[str, Any]], name: str) -> float | None:
    """The mean of a number over the tokens of a run: each line is the mean over those since the line before, and
    counts by how many they are."""
    before = [0, *(line["tokens"] for line in lines)]
    seen = [
        (line[name], line["tokens"] - at)
        for line, at in zip(lines, before, strict=False)
        if line.get(name) is not None
    ]
    tokens = sum(count for _, count in seen)
    return sum(value * count for value, count in seen) / tokens if tokens else None
