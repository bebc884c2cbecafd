"""Samples of training text as one HTML page: what is trained on is marked, and images stand beside as thumbnails."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from selectkd.report.page import policy_of, template, template_file


@dataclass(frozen=True)
class Sample:
    """A sample. pieces: its text as (text, kind), the kind trained, image or empty; thumbnails: PNGs of its images."""

    origin: str
    tokens: int
    trained: int
    pieces: Sequence[tuple[str, str]]
    thumbnails: Sequence[bytes] = ()

    @property
    def images(self) -> list[str]:
        """The thumbnails as data URLs."""
        return [f"data:image/png;base64,{base64.b64encode(one).decode()}" for one in self.thumbnails]


@dataclass(frozen=True)
class Shown:
    """A source: its summary and samples."""

    summary: str
    samples: Sequence[Sample]


def samples_page(title: str, sources: Sequence[Shown]) -> str:
    """The page as HTML, whole in itself: it asks nothing of any network and runs no script."""
    style = template_file("samples.css")
    return template("samples.html.j2").render(
        title=title, sources=sources, style=Markup(style), policy=f"{policy_of(style)}; img-src data:"
    )
