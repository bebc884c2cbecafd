"""Tiny random pairs for the training room."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

from training.tiny import tiny_llama


@pytest.fixture(scope="session")
def teacher_model() -> Any:
    return tiny_llama(1, layers=3, hidden=48)


@pytest.fixture(scope="session")
def _student() -> Any:
    return tiny_llama(2)


@pytest.fixture
def student(_student: Any) -> Any:
    return copy.deepcopy(_student)


@pytest.fixture
def new_student(_student: Any) -> Callable[[], Any]:
    return lambda: copy.deepcopy(_student)
