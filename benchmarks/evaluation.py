"""Real models on real mathematics and code, with intervals, and in pairs.

    python benchmarks/evaluation.py MODEL [MODEL ...] [--suites math,code] [--problems 40] [--tokens 128] [--record]

math: reasoning-gym's gsm_symbolic; code: HumanEval, its first problems, in the sandbox. Greedy. The answers to
a batch are one file of ``--folder``; what is there is not asked again, so that a run cut short goes on where it stood.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path

from record import record

from selectkd.evals.run_suite import Scores, compared, interval_of, run_suite
from selectkd.evals.runs import load_student
from selectkd.evals.sandbox import require
from selectkd.evals.suites import Suite, arithmetic, programming


def suite_of(name: str, problems: int, tokens: int) -> Suite:
    if name == "math":
        return arithmetic(problems, tokens=tokens, seed=0)
    return programming(
        None, problems, tokens=tokens, level=require(unsafe=False), samples=1, k=1, temperature=0.0, seed=0
    )


def part_of(suite: Suite, start: int, stop: int) -> Suite:
    """Problems start to stop alone."""
    prefilled = None if suite.prefilled is None else suite.prefilled[start:stop]
    return replace(
        suite, prompts=suite.prompts[start:stop], prefilled=prefilled,
        score=lambda index, said: suite.score(start + index, said),
    )  # fmt: skip


def scores_of(model: str, suite: Suite, folder: Path, batch_size: int) -> Scores:
    """The scores that lie in ``folder``, batch by batch, and the model's own where they do not yet."""
    name, loaded, seen = Path(model).stem, None, []
    for start in range(0, len(suite.prompts), batch_size):
        stop = min(start + batch_size, len(suite.prompts))
        path = folder / f"{name}-{suite.task}-{suite.decoding.max_new_tokens}-{start}-{stop}.json"
        if not path.is_file():
            loaded = loaded or load_student(model)
            part = run_suite(name, loaded, part_of(suite, start, stop), batch_size=batch_size, heard=print)
            path.write_text(json.dumps(asdict(part)), encoding="utf-8")
        seen.append(json.loads(path.read_text(encoding="utf-8")))
    scores = [score for one in seen for score in one["scores"]]
    answers = [answer for one in seen for answer in one["answers"]]
    return Scores(name, suite.task, suite.metric, scores, interval_of(scores), seen[0]["settings"], answers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+")
    parser.add_argument("--suites", default="math,code")
    parser.add_argument("--problems", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=10)
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
