"""A headless Chromium for the tests of the page, where one is found."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("screenshots", ROOT / "benchmarks" / "report_screenshots.py")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    pytest.importorskip("playwright", reason="the browser's tests need playwright")
    assert SPEC is not None and SPEC.loader is not None
    screenshots = importlib.util.module_from_spec(SPEC)
    SPEC.loader.exec_module(screenshots)
    path = screenshots.chromium()
    if path is None:
        pytest.skip("no Chromium is installed")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield found
        found.close()
