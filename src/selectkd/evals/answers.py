"""Answers compared with the right one: as numbers, or as mathematics."""

from __future__ import annotations

import importlib.util

from selectkd.config.extras import how_to_install
from selectkd.errors import ConfigError
from selectkd.evals.numbers import final_number, last_boxed


def same_number(answer: str, reference: str) -> bool:
    """Whether ``answer`` ends on the number ``reference`` ends on. False where either has none.

    >>> same_number("6 * 7 = 42.", "work ... #### 42"), same_number("about 42.1", "#### 42")
    (True, False)
    """
    right = final_number(reference)
    return right is not None and final_number(answer) == right


def same_mathematics(answer: str, reference: str) -> bool:
    r"""Whether two MATH-style answers mean the same, by math-verify: of each the last \boxed{}, or its plain LaTeX."""
    check_math_verify()
    from math_verify import parse, verify  # pyright: ignore[reportMissingImports]

    boxed, given = last_boxed(reference), last_boxed(answer)
    gold = parse(f"${boxed if boxed is not None else reference}$")
    # math-verify would take several boxes of one answer together
    return bool(gold) and bool(verify(gold, parse(answer if given is None else f"\\boxed{{{given}}}")))


def has_math_verify() -> bool:
    """Whether math-verify is installed."""
    return importlib.util.find_spec("math_verify") is not None


def check_math_verify() -> None:
    """ConfigError unless math-verify is installed."""
    if not has_math_verify():
        raise ConfigError(
            f"MATH-style answers are compared by math-verify. Install it: {how_to_install('math')}."
        )
