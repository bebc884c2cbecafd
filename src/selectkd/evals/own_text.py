"""A run's student and its teacher on the run's own held-out text: KL, perplexity and TAR, with intervals."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.data.order import Padded
from selectkd.data.render import pad_id_of
from selectkd.errors import ConfigError
from selectkd.evals.heldout import plan_of
from selectkd.evals.run_suite import described
from selectkd.evals.statistics import Interval, bootstrap_mean, bootstrap_ratio, paired_bootstrap
from selectkd.models.load import Loaded
from selectkd.objective.objective import Objective
from selectkd.training.heldout.evaluation import Evaluation, evaluate_each

ONE_VERIFIER = Objective("forward_kl", {"name": "greedy_topk", "k": 5}, beta=0.01)
"""What TAR is measured by where students are compared: SelecTKD's defaults, whatever a run trained with."""


def own_text(
    run: str | os.PathLike[str],
    students: Sequence[tuple[str, Callable[[], Loaded]]],
    *,
    limit: int | None = None,
    batch_size: int = 8,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(rows, comparisons) of students on the text the run held out, beside the run's teacher: the contract of ``eval``.

    kl: KL(teacher || student) in nats a token; perplexity: of the text's own tokens, of the teacher as well; tar: by
    greedy top-5 as a mean over sequences. Each has a bootstrap over sequences. ConfigError where the run held no text
    out, and for a student with another tokenizer.
    """
    plan = plan_of(run)
    if not plan.heldout:
        raise ConfigError(
            f"{run} held no text out, so nothing of it is new to its student. "
            "Name a file: --suite perplexity --data FILE."
        )
    examples = plan.heldout[:limit]
    batches = Padded(examples, pad_id=pad_id_of(plan.tokenizer), batch_size=batch_size)
    seen: dict[str, list[Evaluation]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for name, load in students:
        loaded = load()
        if tokenizer_fingerprint(loaded.tokenizer) != tokenizer_fingerprint(plan.tokenizer):
            raise ConfigError(
                f"{name} has another tokenizer than {run}: its tokens are not those of the run's text."
            )
        teacher = plan.teacher.open(plan.tokenizer, student=loaded.model, reference=None)
        if on_progress is not None:
            on_progress(f"{name}: {len(examples)} held-out texts of {run}")
        seen[name] = evaluate_each(loaded.model, teacher, batches, ONE_VERIFIER)
        settings[name] = {"data": f"held out by {run}", "verifier": "greedy_topk, k 5", **described(loaded)}
    rows = [row for name, each in seen.items() for row in _rows(name, each, settings[name])]
    of_teacher = next(iter(seen.values()))
    if all(one.teacher_perplexity is not None for one in of_teacher):
        surprises = [(one.tokens, math.log(one.teacher_perplexity or 1.0)) for one in of_teacher]
        rows.append(_perplexity_row(f"teacher of {run}", surprises, {"data": f"held out by {run}"}))
    return rows, _compared(seen)


def _rows(name: str, each: Sequence[Evaluation], settings: dict[str, Any]) -> list[dict[str, Any]]:
    tokens = [one.tokens for one in each]
    kl = bootstrap_ratio([one.kl * one.tokens for one in each], tokens)
    surprises = [(one.tokens, math.log(one.perplexity)) for one in each]
    return [
        _row(name, "kl", kl, settings),
        _perplexity_row(name, surprises, settings),
        _row(name, "tar", bootstrap_mean([one.tar for one in each]), settings),
    ]


def _perplexity_row(
    name: str, surprises: Sequence[tuple[int, float]], settings: dict[str, Any]
) -> dict[str, Any]:
    """From (tokens, mean surprise) of each sequence."""
    mean = bootstrap_ratio([n * nats for n, nats in surprises], [n for n, _ in surprises])
    interval = Interval(*(math.exp(x) for x in (mean.value, mean.low, mean.high)), n=mean.n)
    return _row(name, "perplexity", interval, settings)


def _row(name: str, metric: str, one: Interval, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "model": name, "task": "own text", "metric": metric, "value": one.value, "low": one.low, "high": one.high,
        "n": one.n, "settings": settings,
    }  # fmt: skip


def _compared(seen: dict[str, list[Evaluation]]) -> list[dict[str, Any]]:
    """Held-out KL of every student after the first minus the first's, each token alike."""
    (first, base), *others = seen.items()
    found = []
    for name, each in others:
        apart = paired_bootstrap(
            [one.kl for one in base], [one.kl for one in each], weights=[one.tokens for one in base]
        )
        found.append(
            {
                "task": "own text", "metric": "kl", "first": first, "second": name, "difference": apart.value,
                "low": apart.low, "high": apart.high, "p_bootstrap": apart.p, "n": apart.n,
            }
        )  # fmt: skip
    return found
