"""lm-evaluation-harness on our models, through its Python API: its tasks, its metrics, its numbers, our intervals."""

from __future__ import annotations

import importlib
import importlib.util
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selectkd import __version__
from selectkd.config.extras import how_to_install
from selectkd.data.alignment import tokenizer_fingerprint
from selectkd.errors import ConfigError, DataError
from selectkd.evals.asking import identity
from selectkd.evals.memory import Memory, key_of
from selectkd.evals.run_suite import Scores, described, interval_of
from selectkd.evals.statistics import Interval, bootstrap_ratio
from selectkd.models.load import Loaded
from selectkd.objective.registry import did_you_mean
from selectkd.rollouts.generate import ends_of

NORMAL_95 = 1.959964
"""Standard errors on either side of a value that hold 95% of a normal distribution."""

ANSWERS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
"""What the harness asks a model for."""
WRONG = (ValueError, KeyError, TypeError, ImportError)
"""What the harness raises for a task that is written wrongly."""
BETWEEN = 1.0
"""Seconds of work that a kill can cost: a score takes milliseconds, and a line on the disk as long again."""

PER_UNIT = (lambda ratio: math.exp(-ratio), lambda ratio: -ratio / math.log(2))
"""Perplexity a word or a byte, and bits a byte, of the mean log-probability; both fall as it rises."""


@dataclass(frozen=True)
class Harness:
    """Tasks by their names in the harness, and the settings of its command line. folder: YAML tasks of one's own."""

    tasks: tuple[str, ...]
    folder: Path | None = None
    shots: int | None = None
    chat: bool = False
    limit: int | None = None
    batch_size: int = 1

    def prepared(self) -> Any:
        """The harness's task manager, once every task and its data could be loaded; no weight is read.

        ConfigError for a missing package and an unknown task, DataError where a task's data cannot be had.
        """
        if importlib.util.find_spec("lm_eval") is None:
            raise ConfigError(f"--suite harness needs lm-eval. Install it: {how_to_install('harness')}.")
        manager = self._of_folder_alone()
        if manager is not None:
            return manager
        manager = _module("lm_eval.tasks").TaskManager(
            include_path=None if self.folder is None else str(self.folder)
        )
        for task in self.tasks:
            if task not in manager.all_tasks:
                raise ConfigError(
                    f"lm-eval has no task {task!r}.{did_you_mean(task, manager.all_tasks)} Tasks of your own are found "
                    "with --task-folder."
                )
        try:
            self._load(manager)
        except DataError:
            raise
        except WRONG as error:
            raise self._unloadable(error) from error
        return manager

    def _of_folder_alone(self) -> Any | None:
        """A manager of the tasks in ``folder`` without the harness's own, whose list takes many seconds to read; None
        where they do not do."""
        if self.folder is None:
            return None
        manager = _module("lm_eval.tasks").TaskManager(include_path=str(self.folder), include_defaults=False)
        if not set(self.tasks) <= set(manager.all_tasks):
            return None
        try:
            self._load(manager)
        except DataError:
            raise
        except WRONG:  # such as a group that names a task of the harness
            return None
        return manager

    def _load(self, manager: Any) -> None:
        """Loads every task; DataError where its data is not there."""
        from datasets.exceptions import DatasetsError

        try:
            manager.load(list(self.tasks))
        except (DatasetsError, OSError) as error:
            raise self._unloadable(error) from error

    def _unloadable(self, error: Exception) -> DataError:
        tasks = ", ".join(self.tasks)
        return DataError(f"a task of {tasks} cannot be loaded: {type(error).__name__}: {error}")

    def run(
        self, name: str, loaded: Loaded, manager: Any, *, memory: Memory | None = None,
        on_progress: Callable[[str], None] | None = None,
    ) -> list[Scores]:  # fmt: skip
        """Each metric of each task. A value is the harness's own; its interval is ours where the value is the mean of
        the problems' scores or a rate a word or byte, else 1.96 of the harness's standard errors, nan without those.
        ``memory``: answers that are in it are not asked for again. After a cut the harness puts what is left into
        other batches, so that such numbers are those of a whole run but for rounding.
        """
        lm_eval = _module("lm_eval")
        if on_progress is not None:
            on_progress(f"{name}: {', '.join(self.tasks)} by lm-eval {lm_eval.__version__}")
        model = _module("lm_eval.models.huggingface").HFLM(
            pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal", batch_size=self.batch_size
        )
        if memory is not None:
            about = [
                __version__,
                lm_eval.__version__,
                *identity(loaded),
                tokenizer_fingerprint(loaded.tokenizer),
            ]
            ends = sorted(ends_of(loaded.tokenizer, loaded.model))
            _Remembered(model, memory, key_of(*about, ends, self.batch_size), loaded.source).put_between()
        found = lm_eval.simple_evaluate(
            model, tasks=list(self.tasks), num_fewshot=self.shots, limit=self.limit, task_manager=manager,
            apply_chat_template=self.chat, log_samples=True,
        )  # fmt: skip
        settings = {
            **described(loaded), "harness": lm_eval.__version__, "chat": self.chat, "limit": self.limit,
            "batch_size": self.batch_size,
        }  # fmt: skip
        rows = [
            one
            for task in found["samples"]
            for one in _metrics(name, task, [task], found, {**settings, **_of_task(task, found)})
        ]
        for group in found.get("groups") or {}:
            tasks = _tasks_of(group, found)
            rows += _metrics(name, group, tasks, found, {**settings, "tasks": tasks})
        return rows


@dataclass
class _Remembered:
    """Stands between the harness and its model: asks it only for what ``memory`` lacks, and keeps what comes.

    To the model it is a cache hook of the harness, called with each answer as it comes. about: the key of all that
    answers rest on besides the question.
    """

    model: Any
    memory: Memory
    about: str
    source: str
    _fresh: dict[str, Any] = field(default_factory=dict)
    _kept_at: float = field(default_factory=time.monotonic)

    def put_between(self) -> None:
        self.model.set_cache_hook(self)
        for method in ANSWERS:
            setattr(self.model, method, self._asking(method, getattr(self.model, method)))

    def add_partial(self, method: str, question: Any, answer: Any) -> None:
        """What the model calls with each answer."""
        self._fresh[self._key(method, question)] = answer
        if time.monotonic() - self._kept_at > BETWEEN:
            self._keep()

    def _asking(self, method: str, ask: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def answered(requests: list[Any], **options: Any) -> list[Any]:
            keys = [None if _drawn(one) else self._key(method, one.args) for one in requests]
            left = [i for i, key in enumerate(keys) if key is None or key not in self.memory.known]
            try:
                fresh = ask([requests[i] for i in left], **options) if left else []
            finally:
                self._keep()
            found = dict(zip(left, fresh, strict=True))
            return [
                found[i] if i in found else _as_given(self.memory.known[str(key)])
                for i, key in enumerate(keys)
            ]

        return answered

    def _key(self, method: str, question: Any) -> str:
        return key_of(self.about, method, list(question))

    def _keep(self) -> None:
        if self._fresh:
            self.memory.keep(self._fresh, model=self.source)
        self._fresh, self._kept_at = {}, time.monotonic()


def _drawn(request: Any) -> bool:
    """Whether an answer is a draw: the next time it would be another one."""
    return any(isinstance(one, dict) and one.get("do_sample") for one in request.args)


def _as_given(answer: Any) -> Any:
    """A pair of log-probability and greediness is a tuple to the harness, and a list in a file."""
    return tuple(answer) if isinstance(answer, list) else answer


def _module(name: str) -> Any:
    """A module of the harness, without its types: they are there only where the extra is installed."""
    return importlib.import_module(name)


def _of_task(task: str, found: dict[str, Any]) -> dict[str, Any]:
    """What the harness says of a task: shots, version, the hash of its prompts, how answers were written."""
    config = found["configs"][task]
    return {
        "shots": found["n-shot"].get(task), "version": found["versions"].get(task),
        "generation": config.get("generation_kwargs"),
    }  # fmt: skip


def _tasks_of(group: str, found: dict[str, Any]) -> list[str]:
    """The tasks of a group, those of its own groups among them, each once."""
    inside = found["group_subtasks"].get(group, [])
    tasks = [task for one in inside for task in ([one] if one in found["samples"] else _tasks_of(one, found))]
    return list(dict.fromkeys(tasks))


def _metrics(
    name: str, task: str, parts: Sequence[str], found: dict[str, Any], settings: dict[str, Any]
) -> list[Scores]:
    """One row for each metric and answer filter of a task, or of a group whose tasks are ``parts``."""
    rows, metrics = [], found["results"][task]
    for key, value in metrics.items():
        metric, _, answer_filter = key.partition(",")
        if not answer_filter or metric.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        samples = [
            one
            for part in parts
            for one in sorted(found["samples"][part], key=lambda one: one["doc_id"])
            if one["filter"] == answer_filter
        ]
        given = [one.get(metric) for one in samples]
        scores = _scores(given, float(value))
        shown = metric if answer_filter == "none" else f"{metric},{answer_filter}"
        interval = _interval(float(value), given, scores, metrics.get(f"{metric}_stderr,{answer_filter}"))
        replies = [list(map(str, one["filtered_resps"])) for one in samples]
        rows.append(Scores(name, task, shown, scores, interval, settings, replies))
    return rows


def _scores(given: Sequence[Any], value: float) -> list[float]:
    """The problems' scores where their mean is ``value``; none where the metric is put together otherwise."""
    if not given or not all(isinstance(one, (bool, int, float)) for one in given):
        return []
    scores = [float(one) for one in given]
    return scores if abs(sum(scores) / len(scores) - value) <= 1e-12 * max(1.0, abs(value)) else []


def _interval(value: float, given: Sequence[Any], scores: list[float], error: Any) -> Interval:
    if scores:
        seen = interval_of(scores)
        return Interval(value, seen.low, seen.high, len(given))
    if given and all(isinstance(one, (tuple, list)) and len(one) == 2 for one in given):
        ratio = bootstrap_ratio(*zip(*given, strict=True))  # log-probability a word or a byte
        for of_ratio in PER_UNIT:
            if math.isclose(of_ratio(ratio.value), value, rel_tol=1e-9):
                return Interval(value, of_ratio(ratio.high), of_ratio(ratio.low), ratio.n)
    apart = NORMAL_95 * error if isinstance(error, (int, float)) else float("nan")
    return Interval(value, value - apart, value + apart, len(given))
