"""``selectkd schema``: what a recipe may say, for editors and for programs that write recipes."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from selectkd.cli.terminal import say


def schema(
    markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the page docs/recipe.md, which describes every key.")
    ] = False,
) -> None:
    """Print the JSON Schema of a recipe."""
    from selectkd.config import Recipe
    from selectkd.config.page import page

    if markdown:
        return say(page())
    say(
        json.dumps(
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": "A recipe of selectkd",
                **{key: value for key, value in Recipe.model_json_schema().items() if key != "title"},
            },
            indent=2,
        )
    )
