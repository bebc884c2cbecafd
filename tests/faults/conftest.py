"""The pair and a whole run of it, made once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from faults.tiny_run import write_dropping_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: Any) -> Path:
    return write_dropping_pair(tmp_path_factory.mktemp("dropping"))
