"""``selectkd demo``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.terminal import progress_console, say, show_progress, without_other_bars

if TYPE_CHECKING:
    from selectkd.training.assembly import Assembly
    from selectkd.training.record.progress import TrainingProgress
    from selectkd.training.record.result import RunResult

ANSWER_TOKENS = 40
ABOUT = "in 7.5 minutes on two Xeon cores with AMX, half an hour on slower ones"


def demo(
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Train tiny models from scratch instead: under a minute, no download."),
    ] = False,
    output_dir: Annotated[
        Path | None,
        typer.Option("--output-dir", help="Where to write the run folder: a new or empty folder."),
    ] = None,
    changes: Changes = None,
    device: Device = "auto",
) -> None:
    """Distil a teacher and compare its student before and after."""
    from selectkd.cli.demo_pair import PROMPTS, help_texts, quick_recipe, real_recipe
    from selectkd.config import load_recipe
    from selectkd.models.devices import training_device
    from selectkd.training.record.progress import TrainingProgress
    from selectkd.training.run import train

    without_other_bars()
    on = training_device(device)
    changes = list(changes or [])
    if quick:
        folder = output_dir or Path(tempfile.mkdtemp(prefix="selectkd-demo-"))
        show_progress("making a tiny teacher of four layers (about 10 seconds)")
        path = quick_recipe(folder)
        prompts: tuple[str, ...] = tuple(text[:40] for text in help_texts()[500:503])
    else:
        (path, root), prompts = real_recipe(), PROMPTS
        os.chdir(root)
        folder = output_dir or _new_folder(Path("runs"), "demo")
        changes.append(f"training.output_dir={json.dumps(str(folder))}")
    recipe = load_recipe(path, changes)

    say(_plan(recipe, folder, quick))
    answers: dict[str, list[str]] = {}
    parts: list[Assembly] = []
    with TrainingProgress(progress_console()) as progress:

        def ask(who: str, model: Any, tokenizer: Any) -> None:
            answers[who] = _answers(model, tokenizer, prompts, who, progress)

        def before_training(assembly: Assembly) -> None:
            parts.append(assembly)
            ask("teacher", assembly.teacher_plan.loaded().model, assembly.tokenizer)
            ask("student before", assembly.student, assembly.tokenizer)

        result = train(recipe, progress=progress, on_assembled=before_training, device=on)
        ask("student after", parts[0].student, parts[0].tokenizer)
    _show(result, prompts, answers, _page(result.run_dir, prompts, answers))
    if result.before is None or result.after is None or not result.after.kl < result.before.kl:
        say("FAILED: the held-out KL did not decrease")
        raise typer.Exit(1)


def _plan(recipe: Any, folder: Path, quick: bool) -> str:
    """What the demo is about to do, in lines."""
    layers, training = recipe.student.from_teacher.layers, recipe.training
    who = "a tiny teacher, made just now," if quick else f"{recipe.teacher.model} (SmolLM2-135M-Instruct)"
    return (
        f"This distils {who} into a student of {layers} of its layers, {'in a minute' if quick else ABOUT}:\n"
        "  1. choose the layers to keep, by the KL that each one's loss costs\n"
        f"  2. train {training.max_steps} steps on {'help texts' if quick else 'real instructions'}; the teacher "
        "verifies every token that the student proposes\n"
        "  3. compare teacher, student before and student after on text that was not trained on\n"
        f"Everything stays on this machine. The run folder is {folder}.\n"
    )


def _answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], who: str, progress: TrainingProgress
) -> list[str]:
    """The model's greedy answer to each prompt, as chat where the tokenizer has a chat template."""
    from selectkd.evals.asking import Decoding, complete
    from selectkd.evals.prompts import prompt_ids
    from selectkd.models.load import Loaded

    name = f"answers of the {who}"
    progress.stage(name, len(prompts))
    texts = complete(
        Loaded(model, tokenizer, "the demo", None), [prompt_ids(one, tokenizer) for one in prompts],
        Decoding(ANSWER_TOKENS), batch_size=1, on_progress=lambda done: progress.stage(name, len(prompts), done),
    )  # fmt: skip
    return [text.strip() for text in texts]


def _new_folder(parent: Path, name: str) -> Path:
    """``parent/name``, or with the first number behind it that is free."""
    tried = [parent / name, *(parent / f"{name}-{i}" for i in range(2, 10_000))]
    return next(folder for folder in tried if not folder.exists())


def _page(folder: Path, prompts: Sequence[str], answers: Mapping[str, Sequence[str]]) -> Path:
    """The page of the run, with the answers that are put beside it."""
    from selectkd.data.durable import write_plain
    from selectkd.report.page import write_report

    texts = [
        {"prompt": prompt, **{who.removeprefix("student "): found[i] for who, found in answers.items()}}
        for i, prompt in enumerate(prompts)
    ]
    write_plain(folder / "answers.json", json.dumps({"texts": texts}, ensure_ascii=False).encode())
    return write_report(folder)


def _show(
    result: RunResult, prompts: Sequence[str], answers: Mapping[str, Sequence[str]], page: Path
) -> None:
    """A table, the texts, what was cut, and what to do next."""
    before, after = result.before, result.after
    if before is not None and after is not None:
        say()
        say(f"{'':<16}{'held-out KL':>12}{'perplexity':>12}{'TAR':>8}{'bite':>8}")
        for name, measured in (("student before", before), ("student after", after)):
            say(
                f"{name:<16}{measured.kl:>12.4f}{measured.perplexity:>12.3f}{measured.tar:>8.3f}{measured.bite:>8.3f}"
            )
        if after.teacher_perplexity is not None:
            say(f"{'teacher':<16}{0:>12.4f}{after.teacher_perplexity:>12.3f}{1:>8.3f}{0:>8.3f}")
        say(f"({before.tokens} held-out tokens in {before.sequences} samples; KL in nats a token)")
    for i, prompt in enumerate(prompts):
        say()
        say(f"{'prompt':<16}{prompt!r}")
        for who, texts in answers.items():
            say(f"{who:<16}{texts[i]!r}" if texts[i] else f"{who:<16}(no text: it ended at once)")
    say()
    if result.kept is not None:
        say(
            f"the student has layers {', '.join(map(str, result.kept))} of its teacher, chosen by measured KL"
        )
    say(f"{result.steps} steps, {result.seconds:.0f} s in all; the student is {result.run_dir / 'student'}")
    say(f"{page} shows the run: curves, texts, and each token by the teacher's verdict")
    for what, command in (
        ("measure it", f"selectkd eval {result.run_dir}"),
        ("your own text next", "selectkd init recipe.yaml"),
    ):
        say(f"{what + ':':<20}{command}")
