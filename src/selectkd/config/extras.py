"""What an optional part of selectkd needs, as a command that works whatever selectkd itself was installed from."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, requires


def how_to_install(extra: str) -> str:
    """The command that installs what one of the package's extras needs.

    It names the requirements themselves: ``pip install 'selectkd[extra]'`` works only where an index has selectkd.

    >>> how_to_install("math").startswith("pip install 'math-verify>=")
    True
    """
    try:
        rows = requires("selectkd") or []
    except PackageNotFoundError:  # run from its source, without an installation
        rows = []
    of_extra = re.compile(rf"(.+?)\s*;\s*extra == ['\"]{re.escape(extra)}['\"]")
    needs = sorted(match[1] for row in rows if (match := of_extra.fullmatch(row)))
    if not needs:
        return f"see the extra `{extra}` in selectkd's pyproject.toml"
    return "pip install " + " ".join(f"'{need}'" for need in needs)
