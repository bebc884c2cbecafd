"""Real models on real mathematics and code, with intervals, and in pairs.

    python benchmarks/evaluation.py MODEL [MODEL ...] [--suites math,code] [--problems 40] [--tokens 128] [--record]

math: reasoning-gym's gsm_symbolic; code: HumanEval, its first problems, in the sandbox. Greedy. A model's answers to a
suite are one file of ``--folder``; what is there is not asked again, so that a run cut short goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import combinations
from pathlib import Path

from record import record

from selectkd.evals.run_suite import Scores, compared, run_suite
from selectkd.evals.runs import load_student
from selectkd.evals.sandbox import require
from selectkd.evals.statistics import Interval
from selectkd.evals.suites import Suite, arithmetic, programming


def suite_of(name: str, problems: int, tokens: int) -> Suite:
    if name == "math":
        return arithmetic(problems, tokens=tokens, seed=0)
    return programming(
        None, problems, tokens=tokens, level=require(unsafe=False), samples=1, k=1, temperature=0.0, seed=0
    )


def scores_of(model: str, suite: Suite, folder: Path, batch_size: int) -> Scores:
    """The scores that lie in ``folder``, else those of the model now."""
    size = f"{len(suite.prompts)}x{suite.decoding.max_new_tokens}"
    path = folder / f"{Path(model).stem}-{suite.task}-{size}.json"
    if not path.is_file():
        seen = run_suite(Path(model).stem, load_student(model), suite, batch_size=batch_size, heard=print)
        path.write_text(json.dumps(asdict(seen)), encoding="utf-8")
    kept = json.loads(path.read_text(encoding="utf-8"))
    return Scores(**{**kept, "interval": Interval(**kept["interval"])})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--suites", default="math,code")
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--folder", type=Path, default=Path(".cache/evaluation"))
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in asked.suites.split(","):
        suite = suite_of(name, asked.problems, asked.tokens)
        case = f"{suite.task}, {asked.problems} problems, {asked.tokens} tokens"
        every = [scores_of(model, suite, asked.folder, asked.batch_size) for model in asked.models]
        for one in every:
            seen = one.interval
            print(f"{case}: {one.model} {one.metric} {seen.value:.3f} [{seen.low:.3f}, {seen.high:.3f}]")
            rows.append((case, one.model, one.metric, seen.value, f"{seen.low:.3g}..{seen.high:.3g}", 1))
        for first, second in combinations(every, 2):
            pair = compared(first, second)
            print(json.dumps(pair))
            whom = f"{second.model} minus {first.model}"
            rows.append(
                (case, whom, first.metric, pair["difference"], f"{pair['low']:.3g}..{pair['high']:.3g}", 1)
            )
            rows.append((case, whom, "McNemar p", pair["p_mcnemar"], "", 1))
    if asked.record:
        record("evaluation", rows)


if __name__ == "__main__":
    main()
