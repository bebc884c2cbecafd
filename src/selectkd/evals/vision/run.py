"""Benchmarks and drawn scenes through one answerer: rows with intervals, and answers beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from selectkd.errors import ConfigError
from selectkd.evals.judging.judges import Judge
from selectkd.evals.memory import Memory
from selectkd.evals.run_suite import Scores
from selectkd.evals.vision.asking import Answerer, Problem, graded, scores_of
from selectkd.evals.vision.benchmarks import BENCHMARKS, Benchmark, file_of, messages
from selectkd.evals.vision.judged import Item, judged_scores
from selectkd.evals.vision.questions import read_questions
from selectkd.evals.vision.synthetic import SCENES, run_synthetic


@dataclass(frozen=True)
class VisionRun:
    """What is asked. folder: with the benchmarks' files; limit: questions of each, or scenes; seed: of the scenes;
    size: pixels across one.

    load_judge: gives the judge of MM-Vet, called when all answers to it are there.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    batch_size: int = 8
    seed: int = 0
    size: int = 224
    load_judge: Callable[[], Judge] | None = None

    def check(self) -> dict[str, Path]:
        """The file of each benchmark; ConfigError, before anything is asked, for what is missing."""
        named = [one for one in self.tasks if one != "synthetic"]
        if named and self.folder is None:
            raise ConfigError(
                f"--tasks {','.join(named)} needs --data, the folder with the benchmarks' files."
            )
        if "mmvet" in named and self.load_judge is None:
            raise ConfigError("--tasks mmvet is graded by a judge. Name one with --judge and --judge-model.")
        return {one: file_of(one, self.folder) for one in named if self.folder is not None}


def run_tasks(
    name: str,
    files: Mapping[str, Path],
    answerer: Answerer,
    run: VisionRun,
    memory: Memory,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> list[Scores]:
    """Every task of a run in its order; files: as ``VisionRun.check`` gives them."""
    rows: list[Scores] = []
    for task in run.tasks:
        if task == "synthetic":
            rows += run_synthetic(
                name, answerer, memory, scenes=run.limit or SCENES, seed=run.seed, size=run.size,
                batch_size=run.batch_size, on_progress=on_progress,
            )  # fmt: skip
        else:
            rows += run_benchmark(name, task, files[task], answerer, run, memory, on_progress=on_progress)
    return rows


def run_benchmark(
    name: str,
    task: str,
    path: Path,
    answerer: Answerer,
    run: VisionRun,
    memory: Memory,
    *,
    on_progress: Callable[[str], None] | None = None,
) -> list[Scores]:
    """One benchmark's file asked and scored: a ``Scores`` for each of its metrics."""
    benchmark = BENCHMARKS[task]
    asked: list[Item] = []
    found = graded(
        _problems(benchmark, path, run.limit, asked), answerer, batch_size=run.batch_size, memory=memory,
        on_progress=None if on_progress is None else lambda done: on_progress(f"{name}, {task}: {done} answers"),
    )  # fmt: skip
    settings: dict[str, Any] = {
        "data": str(path),
        "circular": benchmark.circular,
        "batch_size": run.batch_size,
    }
    if benchmark.grade is None:
        assert run.load_judge is not None  # VisionRun.check
        judge = run.load_judge()
        items = [Item(one.question, one.right, reply.answer) for one, reply in zip(asked, found, strict=True)]
        scores = judged_scores(items, judge, memory)
        found = [replace(one, score=score) for one, score in zip(found, scores, strict=True)]
        settings["judge"] = judge.name
    return scores_of(name, task, found, dict(benchmark.metrics), settings)


def _problems(benchmark: Benchmark, path: Path, limit: int | None, asked: list[Item]) -> Iterator[Problem]:
    for one in read_questions(path, limit=limit, circular=benchmark.circular, split=benchmark.split):
        if benchmark.grade is None:
            asked.append(Item(one.text, one.answer, ""))
        bare = replace(one, images=())  # what is kept of a question until its answer is there
        grade = partial(benchmark.grade, bare) if benchmark.grade is not None else _later
        yield Problem(one.origin, messages(one, benchmark.ask(one)), grade, dict(one.groups))


def _later(answer: str) -> None:
    """A judge grades, when all answers are there."""
