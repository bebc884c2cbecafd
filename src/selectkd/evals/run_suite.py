"""A model through a suite, and models against each other on the same problems."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from selectkd.data.alignment import template_fingerprint
from selectkd.evals.asking import complete
from selectkd.evals.code import STOP
from selectkd.evals.memory import Memory
from selectkd.evals.prompts import prompt_ids
from selectkd.evals.statistics import Interval, mcnemar, paired_bootstrap, score_interval, wilson
from selectkd.evals.suites import Suite
from selectkd.models.load import Loaded


@dataclass(frozen=True)
class Scores:
    """One model on one suite: a score a problem, in the suite's order, and its answers.

    cut: answers that the limit of tokens ended. disputed: problems that a second grader would score otherwise.
    """

    model: str
    task: str
    metric: str
    scores: list[float]
    interval: Interval
    settings: dict[str, Any]
    answers: list[list[str]]
    cut: int = 0
    disputed: list[int] = field(default_factory=list)

    @property
    def right_or_wrong(self) -> bool:
        """Whether every score is 0 or 1."""
        return set(self.scores) <= {0.0, 1.0}

    def as_row(self) -> dict[str, Any]:
        """The contract's row."""
        seen = self.interval
        return {
            "model": self.model, "task": self.task, "metric": self.metric, "value": seen.value, "low": seen.low,
            "high": seen.high, "n": seen.n,
            "settings": {**self.settings, "cut": self.cut, "disputed": len(self.disputed)},
        }  # fmt: skip

    def answer_rows(self) -> list[dict[str, Any]]:
        """One row a problem: its answers and its score, None where the metric has no score of one problem."""
        scores = self.scores or [None] * len(self.answers)
        return [
            {
                "model": self.model,
                "task": self.task,
                "metric": self.metric,
                "index": i,
                "score": score,
                "disputed": i in self.disputed,
                "answers": replies,
            }
            for i, (replies, score) in enumerate(zip(self.answers, scores, strict=True))
        ]


def run_suite(
    name: str,
    loaded: Loaded,
    suite: Suite,
    *,
    batch_size: int = 8,
    memory: Memory | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Scores:
    """Asks every problem, ``samples`` times where the suite wants several, and scores the answers; those
    that are in ``memory`` are not asked again (see ``complete``).
    """
    tokenizer = loaded.tokenizer
    decoding = suite.decoding
    if suite.prefilled is not None and not tokenizer.chat_template:
        prompts = [list(tokenizer(text)["input_ids"]) for text in suite.prefilled]
        decoding = replace(decoding, stop=STOP)
    else:
        prompts = [prompt_ids(text, tokenizer) for text in suite.prompts]
    every = [ids for ids in prompts for _ in range(suite.samples)]
    total = len(every)
    cut: list[bool] = []
    replies = complete(
        loaded, every, decoding, batch_size=batch_size, memory=memory, cut=cut,
        on_progress=None
        if on_progress is None
        else lambda done: on_progress(f"{name}, {suite.task}: {done} of {total} answers"),
    )  # fmt: skip
    answers = [replies[i : i + suite.samples] for i in range(0, total, suite.samples)]
    scores = [suite.score(i, one) for i, one in enumerate(answers)]
    settings = {
        **suite.settings, **asdict(decoding), "samples": suite.samples, "batch_size": batch_size, **described(loaded)
    }  # fmt: skip
    disputed = [
        i for i, one in enumerate(answers) if suite.second is not None and suite.second(i, one) != scores[i]
    ]
    if on_progress is not None and (any(cut) or disputed):
        graders = f"; {len(disputed)} scored otherwise by math-verify" if disputed else ""
        on_progress(
            f"{name}, {suite.task}: {sum(cut)} of {total} answers cut at {decoding.max_new_tokens} tokens{graders}"
        )
    interval = interval_of(scores)
    return Scores(name, suite.task, suite.metric, scores, interval, settings, answers, sum(cut), disputed)


def described(loaded: Loaded) -> dict[str, Any]:
    """What a table says of the model itself: its template, its revision, its dtype."""
    tokenizer = loaded.tokenizer
    return {
        "template": template_fingerprint(tokenizer) if tokenizer.chat_template else None,
        "revision": loaded.revision,
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
    }


def interval_of(scores: list[float]) -> Interval:
    """Wilson's interval where every problem is right or wrong, else that of scores between."""
    if set(scores) <= {0.0, 1.0}:
        return wilson(int(sum(scores)), len(scores))
    return score_interval(scores)


def compared(first: Scores, second: Scores) -> dict[str, Any]:
    """Second minus first on the same problems: paired bootstrap, and McNemar's test where all are right or wrong."""
    apart = paired_bootstrap(first.scores, second.scores)
    row: dict[str, Any] = {
        "task": first.task, "metric": first.metric, "first": first.model, "second": second.model,
        "difference": apart.value, "low": apart.low, "high": apart.high, "p_bootstrap": apart.p, "n": apart.n,
    }  # fmt: skip
    if first.right_or_wrong and second.right_or_wrong:
        test = mcnemar([one == 1 for one in first.scores], [one == 1 for one in second.scores])
        row |= {"only_first": test.only_first, "only_second": test.only_second, "p_mcnemar": test.p}
    return row
