"""``selectkd demo``."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.options import Device
from selectkd.cli.overrides import Changes
from selectkd.cli.terminal import progress_console, say, show_progress, without_other_bars

if TYPE_CHECKING:
    from selectkd.training.assembly import Assembly
    from selectkd.training.record.result import RunResult

ANSWER_TOKENS = 40


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

    seen: dict[str, Any] = {}

    def before_training(assembly: Assembly) -> None:
        seen["assembly"] = assembly
        seen["teacher"] = _answers(assembly.teacher_plan.loaded().model, assembly.tokenizer, prompts)
        seen["before"] = _answers(assembly.student, assembly.tokenizer, prompts)

    with TrainingProgress(progress_console()) as progress:
        result = train(recipe, progress=progress, on_assembled=before_training, device=on)
    seen["after"] = _answers(seen["assembly"].student, seen["assembly"].tokenizer, prompts)
    _report(result, prompts, seen)
    if result.before is None or result.after is None or not result.after.kl < result.before.kl:
        say("FAILED: the held-out KL did not decrease")
        raise typer.Exit(1)


def _answers(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """The model's greedy answer to each prompt, as chat where the tokenizer has a chat template."""
    from selectkd.evals.asking import Decoding, complete
    from selectkd.evals.prompts import prompt_ids
    from selectkd.models.load import Loaded

    asked = [prompt_ids(one, tokenizer) for one in prompts]
    answers = complete(Loaded(model, tokenizer, "the demo", None), asked, Decoding(ANSWER_TOKENS))
    return [text.strip() for text in answers]


def _new_folder(parent: Path, name: str) -> Path:
    """``parent/name``, or with the first number behind it that is free."""
    tried = [parent / name, *(parent / f"{name}-{i}" for i in range(2, 10_000))]
    return next(folder for folder in tried if not folder.exists())


def _report(result: RunResult, prompts: tuple[str, ...], seen: dict[str, Any]) -> None:
    before, after = result.before, result.after
    if result.kept is not None:
        say(f"layers kept of the teacher, chosen by measured KL: {', '.join(map(str, result.kept))}")
    if before is not None and after is not None:
        say("")
        say(f"{'':<16}{'held-out KL':>12}{'perplexity':>12}{'TAR':>8}{'bite':>8}")
        for name, measured in (("student before", before), ("student after", after)):
            say(
                f"{name:<16}{measured.kl:>12.4f}{measured.perplexity:>12.3f}{measured.tar:>8.3f}{measured.bite:>8.3f}"
            )
        if after.teacher_perplexity is not None:
            say(f"{'teacher':<16}{0:>12.4f}{after.teacher_perplexity:>12.3f}{1:>8.3f}{0:>8.3f}")
        say(f"({before.tokens} held-out tokens in {before.sequences} samples; KL in nats a token)")
    for i, prompt in enumerate(prompts):
        say("")
        say(f"prompt   {prompt!r}")
        for who in ("teacher", "before", "after"):
            say(f"{who:<9}{seen[who][i]!r}")
    say("")
    say(f"{result.steps} steps, {result.seconds:.0f} s in all; the run folder is {result.run_dir}")
    say(f"the student is an ordinary model folder: {result.run_dir / 'student'}")
