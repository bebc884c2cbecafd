"""Shapes in signatures are checked while the tests run: jaxtyping's annotations, by beartype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config, install_import_hook

MATHEMATICS = (
    "pair",
    "rows",
    "divergences",
    "verifiers",
    "selectors",
    "objective",
    "distill",
    "randomness",
    "testing",
)

install_import_hook([f"selectkd.{room}" for room in MATHEMATICS], "beartype.beartype")


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shape checks off: for the tests that pass wrong shapes and types, and expect our own message."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
