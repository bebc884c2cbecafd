"""``selectkd generate RECIPE --out FILE``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.options import ApiKeyEnv, Device
from selectkd.cli.overrides import Changes
from selectkd.cli.plugin import AllowPlugin
from selectkd.cli.terminal import say, show_progress, without_other_bars
from selectkd.errors import ConfigError


def generate(
    recipe: Annotated[str, typer.Argument(help="The recipe, whose prompts and models are used.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="A .jsonl file. If it exists, only the missing texts are added."
        ),
    ],
    by: Annotated[
        str | None,
        typer.Option(
            "--by", help="Who writes: teacher, student or teacher+student. Default: the policy's choice."
        ),
    ] = None,
    copies: Annotated[int, typer.Option("--copies", min=1, help="Texts to write for each prompt.")] = 1,
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="An OpenAI-compatible server that serves the teacher and writes its texts.",
        ),
    ] = None,
    server_model: Annotated[
        str | None, typer.Option("--server-model", help="The teacher's name on the server.")
    ] = None,
    wait: Annotated[
        float, typer.Option("--server-wait", min=0, help="Seconds to wait until the server answers.")
    ] = 60.0,
    api_key_env: ApiKeyEnv = None,
    device: Device = "auto",
    allow_plugin: AllowPlugin = None,
    changes: Changes = None,
) -> None:
    """Generate training texts for the prompts of a recipe.

    SeqKD trains on the teacher's texts, DistiLLM-2 on pairs of teacher's and student's.

    Sampling follows the recipe's policy: --set method=seqkd, or --set 'data.policy={name: teacher, temperature: 0.8}'.
    """
    from selectkd.config import load_recipe

    checked = load_recipe(recipe, changes or [])
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise ConfigError(f"--out {out}: name a file in a folder that exists.")
    if out.suffix != ".jsonl":
        raise ConfigError(f"--out {out}: the texts are lines of JSON; name a .jsonl file.")
    if (server is None) != (server_model is None):
        raise ConfigError("--server URL and --server-model NAME go together.")

    from selectkd.teachers.remote.secrets import key_of

    api_key = key_of(api_key_env, "--api-key-env")

    from selectkd.models.devices import use_device
    from selectkd.rollouts.completion_server import CompletionServer
    from selectkd.training.write_texts import job_of, write

    without_other_bars()
    on = use_device(device)
    there = None
    if server is not None and server_model is not None:
        there = CompletionServer(server, server_model, api_key, wait)
    job = job_of(checked, by, copies=copies, server=there)
    started = time.perf_counter()
    count = lambda written, wanted: show_progress(f"{written} of {wanted} texts")  # noqa: E731
    done = write(checked, out, job, device=on, on_texts=count)
    seconds = time.perf_counter() - started
    say(
        f"{out}: {done.written} texts written ({done.tokens} tokens, {done.tokens / seconds:.0f} a second), "
        f"{done.found} existed; duplicate prompts {done.twice}, prompts too long {done.no_room}"
    )
    say(f"inspect it with: selectkd data show {out} --tokenizer MODEL; train on it as data.sources[].path")
