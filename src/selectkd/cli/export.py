"""``selectkd export RUN|FOLDER --to TARGET --out FOLDER``: a student for another runtime, once it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.terminal import say, show_progress, without_other_bars
from selectkd.errors import ConfigError

if TYPE_CHECKING:
    from selectkd.evals.export import Report, Texts
    from selectkd.models.export.student import Student

PROMPT_CHARACTERS = 140
CALIBRATION, LONGEST = 128, 512
"""Records that roundings are chosen for, and tokens of each."""


def export(
    run: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run folder or a model folder.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="TARGET",
            help="What to write: hf, merged, adapter, gguf, vllm-draft, sglang-draft, onnx or mlx.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write the export to.")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="The number format: f32, f16, bf16; for gguf also q8_0, q5_1, q4_0. Default: by target.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            "--checkpoint",
            metavar="STEP|PATH",
            help="A checkpoint of the run. Default: its student.",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="The model that the student drafts for: also measure acceptance."),
    ] = None,
    draft_length: Annotated[
        int | None,
        typer.Option(
            "--draft-length",
            min=1,
            max=64,
            help="Tokens of a draft. Default: the length with the best expected speed.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="A file of records to take prompts from. Default: pieces of Python's own help pages.",
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="Records like the student's own: rounds to q8_0, q5_1 or q4_0 so that they change least.",
        ),
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=2, help="Number of prompts to measure on.")] = 50,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Maximum tokens of an answer.")] = 24,
    bound: Annotated[
        float | None,
        typer.Option(
            "--bound",
            min=0.0,
            metavar="NATS",
            help="KL to the student above which it refuses. Default: by type.",
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Export a student to another runtime, and check the result.

    The export is read back and compared: ids, end tokens, chat template, KL, best tokens, greedy answers.
    It is refused where it differs.
    """
    from selectkd.models.export.kinds import CALIBRATED, DRAFTS, kind_of

    kind = kind_of(to, kind)
    if calibrate is not None and kind not in CALIBRATED:
        raise ConfigError(
            f"--calibrate is for rounding to {', '.join(CALIBRATED)}, and --type is {kind}. Leave it out."
        )
    if to in DRAFTS and target is None:
        raise ConfigError(f"--to {to} needs --target, the model that the server serves.")

    from selectkd.evals.export import check_out
    from selectkd.evals.export import export as write
    from selectkd.models.export.student import Options
    from selectkd.models.export.targets import TARGETS
    from selectkd.models.load import load_model

    without_other_bars()
    chosen = TARGETS[to]
    chosen.check()
    check_out(out, run, target)
    student, about = _student(run, checkpoint, adapter=to == "adapter")
    texts = _texts(student, prompts, limit, tokens)
    drafts_for = None if target is None else load_model(target)
    calibration = () if calibrate is None else _calibration(calibrate, student, texts)
    options = Options(kind, out.absolute(), drafts_for, target, draft_length, calibration)
    report = write(
        student, chosen, options, texts, about={"target": to, **about}, bound=bound, stage=show_progress
    )
    write_answer(json_file, report.content)
    _show(report)


def _student(run: str, checkpoint: str | None, *, adapter: bool) -> tuple[Student, dict[str, Any]]:
    """(the student, where it comes from): a finished run's, a checkpoint's, or a model folder's."""
    from selectkd.evals.runs import load_student, load_student_at, read_manifest
    from selectkd.models.export.student import Student
    from selectkd.models.lora import merge
    from selectkd.rollouts.generate import ends_of
    from selectkd.teachers.cache.origin import weights_checksum
    from selectkd.training.checkpoint.folder import all_in

    folder = Path(run).expanduser()
    is_run = (folder / "run.json").is_file() or (folder / "metrics.jsonl").is_file()
    if checkpoint is not None and not is_run:
        raise ConfigError(f"--checkpoint {checkpoint} is of a run, and {run} is none. Leave it out.")
    path, recipe, base, revision = None, None, None, None
    if (
        adapter
        and (folder / "student").is_dir()
        and checkpoint is None
        and not all_in(folder / "checkpoints")
    ):
        raise ConfigError(
            f"{run} has kept no checkpoint, and its student has the adapter merged in. Use --to merged, or train with "
            "training.save_every: 50."
        )
    if is_run and (checkpoint is not None or adapter or not (folder / "student").is_dir()):
        loaded, path, recipe = load_student_at(folder, checkpoint)
        base, revision = recipe["student"].get("model"), recipe["student"].get("revision")
    else:
        loaded = load_student(run)
        recipe = read_manifest(folder)["config"] if (folder / "manifest.json").is_file() else None
    model = loaded.model if adapter else merge(loaded.model)
    about = {
        "student": loaded.source,
        "run": str(folder) if is_run else None,
        "checkpoint": path,
        "teacher": None if recipe is None else recipe["teacher"],
        "weights_xxh3_128": weights_checksum(model),
    }
    return Student(model, loaded.tokenizer, loaded.source, ends_of, base=base, base_revision=revision), about


def _texts(student: Student, prompts: Path | None, limit: int, tokens: int) -> Texts:
    """The prompts of a file, or pieces of Python's help pages, as the student reads prompts."""
    from selectkd.cli.demo_pair import help_texts
    from selectkd.evals.export import Texts
    from selectkd.evals.prompts import prompt_ids, read_prompts

    tokenizer = student.tokenizer
    if prompts is not None:
        ids, source = read_prompts(prompts, tokenizer, limit=limit), str(prompts)
    else:
        pieces = help_texts(PROMPT_CHARACTERS)
        chosen = pieces[:: max(1, len(pieces) // limit)][:limit]
        ids, source = [prompt_ids(one, tokenizer) for one in chosen], "pydoc_data.topics"
    return Texts(ids, [tokenizer.decode(one) for one in ids], tokens, source)


def _calibration(file: Path, student: Student, texts: Texts) -> list[list[int]]:
    """Records of a file other than those that the export is measured on."""
    from selectkd.evals.prompts import read_texts

    found = read_texts(
        file, student.tokenizer, limit=CALIBRATION, longest=LONGEST, without=set(map(tuple, texts.prompts))
    )
    if not found:
        raise ConfigError(
            f"--calibrate {file} has no record beside those that the export is measured on. Name another file, or "
            "leave --prompts out."
        )
    return found


def _show(report: Report) -> None:
    found, content = report.fidelity, report.content
    say(f"{report.folder}: {content['target']} in {content['type']}, read back by {content['read_back_by']}")
    say(f"ids                 the same on {found.id_texts} texts")
    say(
        f"KL to the student   {found.kl.value:.3g} nats a token, [{found.kl.low:.3g}, {found.kl.high:.3g}] on "
        f"{found.texts} texts, bound {content['bound']:g}"
    )
    say(f"same best token     {found.top1.value:.4f} [{found.top1.low:.4f}, {found.top1.high:.4f}]")
    say(f"same greedy answer  {found.greedy()}")
    if report.drafted is not None:
        one = report.drafted
        say(
            f"acceptance          {one.before.value:.3f} [{one.before.low:.3f}, {one.before.high:.3f}] before"
        )
        if one.after is not None:
            say(
                f"                    {one.after.value:.3f} [{one.after.low:.3f}, {one.after.high:.3f}] after"
            )
        say(f"draft length        {one.draft_length}, expected speed-up {one.speedup:.2f}")
    notes = content["notes"]
    if notes.get("calibration"):
        say(
            f"rounded for          {notes['calibration']['texts']} records, {notes['calibration']['tokens']:,} tokens"
        )
    for note in notes.get("notes", ()):
        say(f"note: {note}")
    if "command" in notes:
        say(notes["command"])
