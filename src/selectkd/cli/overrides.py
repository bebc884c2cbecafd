"""``--set`` and what stands for it: options of every verb that reads a recipe."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from selectkd.cli.verb import Verb
from selectkd.errors import ConfigError

Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change one key of the recipe, such as training.learning_rate=1e-4. Repeatable; --set may be left out.",
    ),
]

KEY_AND_VALUE = re.compile(r"[A-Za-z_]\w*(\.\w+)*=")


class OfRecipe(Verb):
    """A verb that reads a recipe: --config RECIPE is RECIPE, and KEY=VALUE is --set KEY=VALUE."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The arguments as written here, parsed."""
        options = {name: one for one in self.params for name in one.opts if name.startswith("-")}
        recipe: list[str] = []
        rest: list[str] = []
        left = list(args)
        while left:
            word = left.pop(0)
            name, equals, value = word.partition("=")
            if name == "--config":
                recipe += [value] if equals else left[:1]
                del left[: not equals]
            elif KEY_AND_VALUE.match(word) and "--set" in options and not Path(word).exists():
                rest += ["--set", word]
            else:
                _check(name, {*options, *ctx.help_option_names})
                rest.append(word)
                if word in options and not getattr(options[word], "is_flag", False):
                    rest += left[:1]
                    del left[:1]
        return super().parse_args(ctx, recipe + rest)


def _check(name: str, known: Any) -> None:
    """ConfigError for a key of a recipe, or another trainer's word for one, that is written as an option."""
    if name.startswith("--") and name not in known:
        from selectkd.config.words import instead

        if hint := instead([name[2:]]):
            raise ConfigError(f"there is no option {name}.{hint} Give it as KEY=VALUE, without dashes.")
