"""Components from outside the package: which modules a recipe may name, and which of their objects.

A recipe comes from anywhere, so a name ``module:object`` in it loads a module only where the user allowed it
(``allow_plugin``, ``--allow-plugin``) or an installed package did (entry points of the group ``selectkd.plugins``), and
only an object that says by ``component`` what it is. The folder of a recipe is searched for allowed modules alone: a
file beside a recipe takes no other module's place.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from selectkd.errors import ConfigError

KINDS = ("divergence", "verifier", "selector", "extra")
"""What an object may declare itself as; a method is a part of a recipe, and no code."""

GROUP = "selectkd.plugins"
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
MARK = "selectkd_component"

Granted = tuple[Sequence[str], Sequence[str]]
"""(modules, folders) that a process allows."""

Declared = TypeVar("Declared", bound=Callable[..., Any])

_allowed: dict[str, None] = {}
_places: dict[str, None] = {}
"""Of the whole process, as its import system is: the modules allowed, and the folders of the recipes read."""


def component(kind: str) -> Callable[[Declared], Declared]:
    """A decorator by which a function or class says what recipes may use it as: one of KINDS.

    >>> @component("divergence")
    ... def squared(logp, logq):
    ...     return (logp.exp() - logq.exp()).square().sum(-1)
    >>> squared.selectkd_component
    'divergence'
    """
    if kind not in KINDS:
        raise ConfigError(f"a component of the kind {kind!r} is unknown. Known: {', '.join(KINDS)}.")

    def declared(target: Declared) -> Declared:
        setattr(target, MARK, kind)
        return target

    return declared


def allow_plugin(*modules: str) -> None:
    """Lets recipes load these modules, and those below them, for the rest of the process.

    ConfigError for what is no name of a module.
    """
    for module in modules:
        if not MODULE.fullmatch(module):
            raise ConfigError(
                f"--allow-plugin {module!r} is no module. Write its name: my_pkg or my_pkg.losses."
            )
    _allowed.update(dict.fromkeys(modules))
    if not any(isinstance(finder, _Beside) for finder in sys.meta_path):
        sys.meta_path.append(_Beside())


def search(folder: Path) -> None:
    """Has allowed modules be found in ``folder`` where they are not installed."""
    _places[str(folder.absolute())] = None


def granted() -> Granted:
    """(modules, folders) that were allowed by name, for another process to ``grant``."""
    return tuple(_allowed), tuple(_places)


def grant(given: Granted) -> None:
    """Allows what ``granted`` gave in another process."""
    allow_plugin(*given[0])
    for folder in given[1]:
        search(Path(folder))


def load(path: str, kind: str) -> Callable[..., Any]:
    """The object ``module:object`` names, for a kind such as "divergence" or "verifier or selector".

    ConfigError, before anything is imported, for a module that is not allowed; and for one that cannot be imported,
    for an object that is not there, and for one that does not declare itself as that kind.
    """
    module, _, name = path.partition(":")
    if not MODULE.fullmatch(module) or not name.isidentifier():
        raise ConfigError(f"{kind} {path!r} is no name. Write module:object, such as my_pkg.losses:my_loss.")
    if not _may(module):
        raise ConfigError(
            f"{kind} {path!r} is code of the module {module}, which you have not allowed. If you trust it: "
            f"--allow-plugin {module} on the command line, selectkd.allow_plugin({module!r}) in Python."
        )
    try:
        found = pkgutil.resolve_name(path)
    except (ImportError, SyntaxError, AttributeError, NameError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{kind} {path!r} cannot be imported: {type(error).__name__}: {error}. "
            "The module must be installed, on PYTHONPATH or beside the recipe."
        ) from error
    declared = getattr(found, MARK, None)
    if declared not in kind.split(" or ") or not callable(found):
        is_it = (
            f"declares itself as a {declared}"
            if declared in KINDS
            else "does not declare itself as a component"
        )
        raise ConfigError(
            f"{kind} {path!r} {is_it}. Where it is a {kind}, write @selectkd.component({kind.split()[0]!r}) above it."
        )
    return found


def _may(module: str) -> bool:
    """Whether a module, or one above it, is allowed by name or by an installed package."""
    installed = {entry.value.partition(":")[0].strip() for entry in entry_points(group=GROUP)}
    return any(module == one or module.startswith(f"{one}.") for one in {*_allowed, *installed})


class _Beside(MetaPathFinder):
    """Finds allowed modules beside recipes, after everything else has not."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if path is None and any(one.partition(".")[0] == fullname for one in _allowed):
            return PathFinder.find_spec(fullname, list(_places))
        return None
