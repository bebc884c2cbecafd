"""Other people's loggers: what they raise or how long they take is told once, and the run goes on."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from selectkd.training import loggers
from selectkd.training.trainer import LedgerTrainer
from training.tiny import padded, texts

pytestmark = pytest.mark.filterwarnings("error")


class Counting(TrainerCallback):
    """A logger that notes what it hears, and raises or hangs at an event of a step."""

    heard: list[tuple[str, int]]
    threads: set[int]
    let_go: threading.Event
    fails: Callable[[str, int], None]

    def __init__(self) -> None:
        self.fails("made", 0)

    def _hear(self, event: str, state: Any) -> None:
        self.threads.add(threading.get_ident())
        self.fails(event, state.global_step)
        self.heard.append((event, state.global_step))

    def on_train_begin(self, args, state, control, **named):
        self._hear("begin", state)

    def on_log(self, args, state, control, logs=None, **named):
        assert "loss" in logs or "train_loss" in logs
        self._hear("log", state)


@pytest.fixture
def trained(monkeypatch: Any, student: Any, teacher_model: Any, tmp_path: Any) -> Iterator[Any]:
    """Trains three steps with a logger that calls ``fails(event, step)``, and returns the logger and its steps."""
    let_go = threading.Event()

    def made(fails: Callable[[str, int, threading.Event], None]) -> tuple[type[Counting], int]:
        kind = type(
            "Own",
            (Counting,),
            {
                "heard": [],
                "threads": set(),
                "let_go": let_go,
                "fails": lambda self, event, step: fails(event, step, let_go),
            },
        )
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", kind)
        args = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, logging_steps=1, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        from selectkd import Objective
        from selectkd.teachers.live import LiveTeacher
        from selectkd.training.feed import BatchFeed
        from selectkd.training.ledger import Ledger
        from selectkd.training.step import DistillationModel

        trainer = LedgerTrainer(
            DistillationModel(student, LiveTeacher(teacher_model)),
            BatchFeed(lambda _: padded(texts(6, streams=1), 2)),
            Ledger(Objective()),
            args,
        )
        trainer.add_callback(loggers.Loggers(["tensorboard"], wait=0.5))
        trainer.train()
        return kind, trainer.ledger.step

    yield made
    let_go.set()


def test_a_logger_hears_every_event_in_one_thread_of_its_own(trained: Any, caplog: Any) -> None:
    kind, steps = trained(lambda *_: None)
    assert steps == 3 and kind.heard[0] == ("begin", 0)
    assert [step for event, step in kind.heard if event == "log"] == [1, 2, 3, 3]
    assert len(kind.threads) == 1 and threading.get_ident() not in kind.threads
    assert "report_to" not in caplog.text


@pytest.mark.parametrize("where", ["made", "begin", "log"])
@pytest.mark.parametrize("error", [RuntimeError("no network"), OSError(28, "full"), AssertionError()])
def test_a_logger_that_raises_is_told_once_and_the_run_goes_on(
    where: str, error: Exception, trained: Any, caplog: Any
) -> None:
    def fails(event: str, step: int, let_go: Any) -> None:
        if event == where:
            raise error

    kind, steps = trained(fails)
    assert steps == 3 and caplog.text.count("training.report_to: tensorboard failed") == 1
    assert type(error).__name__ in caplog.text and not [one for one in kind.heard if one[0] == where]


@pytest.mark.parametrize("where", ["made", "begin", "log"])
def test_a_logger_that_hangs_is_told_once_and_left_behind(where: str, trained: Any, caplog: Any) -> None:
    def fails(event: str, step: int, let_go: Any) -> None:
        if event == where:
            let_go.wait(60)

    _, steps = trained(fails)
    assert steps == 3 and caplog.text.count("is waited for once more at the end") == 1


def test_held_out_measures_and_the_recipe_reach_the_loggers_and_measures_stay_on_the_screen(
    monkeypatch: Any, tmp_path: Any
) -> None:
    from rich.console import Console

    from selectkd.config import recipe_from
    from selectkd.training.record import metrics
    from selectkd.training.record.progress import TrainingProgress
    from selectkd.training.run import train
    from training.tiny import recipe_of, tiny_llama, write_pair

    heard: list[dict[str, float]] = []
    noted: list[dict[str, Any]] = []

    class Logger(TrainerCallback):
        def on_train_begin(self, args, state, control, **named):
            noted.extend([args.to_dict(), json.loads(args.to_json_string()), args.to_sanitized_dict()])

        def on_log(self, args, state, control, logs=None, **named):
            heard.append({"step": state.global_step, **logs})

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Logger)
    monkeypatch.setattr(metrics, "get_available_reporting_integrations", lambda: ["tensorboard"])
    write_pair(tmp_path, tiny_llama(1, layers=3))
    settings = {
        "output_dir": str(tmp_path / "run"), "max_steps": 4, "batch_size": 3, "max_length": 24,
        "max_prompt_length": 12, "evaluate_every": 2, "report_to": ["tensorboard"],
    }  # fmt: skip
    recipe = recipe_from({**recipe_of(tmp_path, data={"evaluation": 0.25}), "training": settings})
    with (tmp_path / "screen").open("w+") as screen, TrainingProgress(Console(file=screen)) as progress:
        result = train(recipe, progress=progress)
        screen.seek(0)
        shown = screen.read()
    measured = {one["step"]: one["eval_kl"] for one in heard if "eval_kl" in one}
    assert (
        set(measured) == {2, 4} and result.after is not None and measured[4] == pytest.approx(result.after.kl)
    )
    assert [f"held-out text after step {step}:" in shown for step in (0, 2, 4)] == [True] * 3
    for each in noted:  # what W&B, MLflow, TensorBoard and others take for a run's configuration
        assert each["recipe.objective.verifier.name"] == recipe.objective.verifier["name"]
        assert each["recipe.training.max_length"] == 24 and each["max_steps"] == 4
        assert each["recipe.data.evaluation"] == 0.25
    assert len(noted) == 3


def test_each_stage_has_a_bar_of_its_own_and_a_pipe_a_line(tmp_path: Any) -> None:
    from rich.console import Console

    from selectkd.training.record.progress import TrainingProgress

    with (tmp_path / "screen").open("w+") as screen:
        progress = TrainingProgress(Console(file=screen))
        shown = lambda: (progress.bar.tasks[0].completed, progress.bar.tasks[0].total)  # noqa: E731
        progress.stage("choosing layers", 6)
        progress.stage("choosing layers", 6, 2)
        assert shown() == (2, 6)
        progress.stage("measuring")
        assert shown() == (0, None), "an old stage's total does not stay"
        screen.seek(0)
        assert screen.read().splitlines() == ["choosing layers", "measuring"]


def test_a_logger_gets_the_report_before_the_end_and_one_that_takes_none_is_told_of_once(
    monkeypatch: Any, tmp_path: Any, caplog: Any
) -> None:
    heard: list[str] = []
    let_go = threading.Event()

    class Whole(TrainerCallback):
        def on_train_end(self, args, state, control, **named):
            heard.append("end")

    def attached(kind: str) -> Callable[[Any, Any], None]:
        def attach(callback: Any, report: Any) -> None:
            if kind == "raises":
                raise OSError(28, "no room")
            if kind == "hangs":
                let_go.wait(60)
            heard.append(report.name)

        return attach

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Whole)
    for kind, expected, warned in (
        ("takes", ["report.html", "end"], ""),
        ("raises", [], "tensorboard failed, and hears no more: OSError"),
        ("hangs", [], "has not answered the report"),
    ):
        heard.clear()
        caplog.clear()
        monkeypatch.setitem(loggers.ATTACH, "tensorboard", attached(kind))
        callback: Any = loggers.Loggers(["tensorboard"], wait=0.3)
        args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
        callback.on_train_end(args, TrainerState(), TrainerControl())
        assert heard == [], "the end waits for the report"
        callback.close(tmp_path / "report.html")
        assert heard == expected and caplog.text.count("training.report_to") == (1 if warned else 0)
        assert warned in caplog.text
    let_go.set()


def test_a_slow_logger_has_all_of_the_run_before_it_ends(
    monkeypatch: Any, tmp_path: Any, caplog: Any
) -> None:
    heard: list[str] = []

    class Slow(TrainerCallback):
        def on_train_begin(self, args, state, control, **named):
            time.sleep(0.4)
            heard.append("begin")

        def on_train_end(self, args, state, control, **named):
            heard.append("end")

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Slow)
    monkeypatch.setitem(loggers.ATTACH, "tensorboard", lambda callback, report: heard.append(report.name))
    callback: Any = loggers.Loggers(["tensorboard"], wait=0.3)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    callback.on_train_begin(args, TrainerState(), TrainerControl())
    assert heard == [], "the run goes on without it"
    callback.on_train_end(args, TrainerState(), TrainerControl())
    callback.close(tmp_path / "report.html")
    assert heard == ["begin", "report.html", "end"] and caplog.text.count("training.report_to") == 1


def test_a_report_that_cannot_be_written_is_one_warning(tmp_path: Any, caplog: Any) -> None:
    def fails(folder: Any) -> Any:
        raise ZeroDivisionError("nothing was measured")

    assert loggers.written(fails, tmp_path) is None
    assert caplog.text.count("no report was written: ZeroDivisionError: nothing was measured") == 1
    assert loggers.written(lambda folder: folder / "page", tmp_path) == tmp_path / "page"
