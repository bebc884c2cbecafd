"""``selectkd push RUN REPO``: a finished run's student on the hub, with its card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.terminal import say, show_progress


def push(
    run: Annotated[Path, typer.Argument(help="The run folder, finished.")],
    repo: Annotated[str, typer.Argument(help="The repository on the hub, OWNER/NAME.")],
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FOLDER", help="A folder of `selectkd export` to upload as well."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="The branch to write to. Default: main.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.", show_default=False)
    ] = False,
    license: Annotated[
        str | None,
        typer.Option("--license", help="The student's licence, an identifier of the hub such as apache-2.0."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the card and the files, and upload nothing.", show_default=False
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Upload a student to the Hugging Face hub with a model card.

    The token comes from HF_TOKEN or `hf auth login`. The same command resumes an upload that broke off.
    """
    from selectkd.training.record.upload import CARD, plan_upload, upload

    plan = plan_upload(run, repo, export=export, license=license)
    sizes = {CARD: len(plan.card.encode())} | {name: path.stat().st_size for name, path in plan.files.items()}
    address = None
    for name in plan.left_out:
        say(f"{name} is not in the card: none of its rows is of a model named {run.resolve().name}")
    if dry_run:
        say(plan.card)
        for name, size in sizes.items():
            say(f"{size:>14,}  {name}")
        say(f"{plan.bytes:>14,}  bytes in all; nothing was uploaded")
    else:
        show_progress(f"{len(sizes)} files, {plan.bytes:,} bytes")
        address = upload(plan, repo, revision=revision, private=private)
        say(address)
    write_answer(json_file, {"repository": repo, "files": sizes, "card": plan.card, "commit": address})
