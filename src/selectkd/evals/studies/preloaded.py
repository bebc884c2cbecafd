"""What a run needs, imported once: the processes of a comparison start from here."""

from __future__ import annotations

from selectkd.training import run as run
