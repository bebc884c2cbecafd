"""A page in a browser, with what it asks for and says."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class Opened:
    """A page with what it asked for and what it wrote on the console."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.tab = browser.new_context(**options).new_page()
        self.requests: list[str] = []
        self.messages: list[str] = []
        self.tab.on("request", lambda one: self.requests.append(one.url))
        self.tab.on("console", lambda one: self.messages.append(one.text))
        self.tab.on("pageerror", lambda one: self.messages.append(str(one)))
        self.tab.goto(path.absolute().as_uri(), wait_until="load")

    def quiet(self) -> bool:
        return len(self.requests) == 1 and not self.messages
