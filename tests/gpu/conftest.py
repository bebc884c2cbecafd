"""What tests on the pretended GPU share."""

from __future__ import annotations

import pytest

from selectkd.loss import by_device


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own operations on the GPU too: in Triton's interpreter the kernels take most of a test's time."""
    monkeypatch.setitem(by_device._OBSTACLES, "cuda", "this test does without them")
