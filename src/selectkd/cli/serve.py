"""``selectkd serve-teacher MODEL``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from selectkd.cli.options import ApiKeyEnv, Device, Dtype
from selectkd.cli.terminal import say, without_other_bars
from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError


def serve_teacher(
    model: Annotated[str, typer.Argument(help="The teacher: a folder, a .gguf file or a model on the hub.")],
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on. 0 takes a free one.")
    ] = 8765,
    host: Annotated[
        str, typer.Option(help="The address to listen on. Any but this machine's own needs a key and TLS.")
    ] = "127.0.0.1",
    revision: Annotated[str | None, typer.Option(help="The commit of a model on the hub.")] = None,
    dtype: Dtype = "float32",
    quantization: Annotated[
        str | None, typer.Option(help="Load with fewer bits: bitsandbytes-4bit or bitsandbytes-8bit.")
    ] = None,
    device: Device = "auto",
    batch: Annotated[
        int,
        typer.Option(
            min=1, help="Samples to read together. With 1, answers do not depend on other requests."
        ),
    ] = 8,
    api_key_env: ApiKeyEnv = None,
    certificate: Annotated[Path | None, typer.Option(help="A TLS certificate, as a PEM file.")] = None,
    key: Annotated[Path | None, typer.Option(help="The certificate's private key, as a PEM file.")] = None,
) -> None:
    """Serve a teacher to runs on this machine or others.

    The server gives hidden states or the best tokens of each position.
    """
    try:
        from selectkd.teachers.server.run import check_place, listen, serve, token_of
    except ModuleNotFoundError as error:
        if error.name not in ("uvicorn", "starlette"):
            raise
        raise ConfigError(f"a server needs {error.name}. Install it: {how_to_install('server')}.") from error

    token = token_of(api_key_env)
    check_place(host, token, certificate, key)
    listener = listen(host, port)

    from selectkd.models.devices import use_device
    from selectkd.models.load import load_model
    from selectkd.teachers.server.engine import Engine

    without_other_bars()
    on = use_device(device)
    loaded = load_model(model, dtype=dtype, quantization=quantization, revision=revision).on(on)
    engine = Engine(loaded, dtype=dtype, batch=batch)
    serve(
        engine,
        listener,
        token=token,
        certificate=certificate,
        key=key,
        ready=lambda url: say(
            f"{model} is served at {url}. In a recipe: teacher: {{url: {url}, kind: selectkd}}"
        ),
    )
