"""What one token costs: a divergence, a verifier or selector, and beta. Imports torch and jaxtyping alone.

``registry`` and ``plugins`` import no torch, so that recipes are checked without it.
"""

from __future__ import annotations

import warnings
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "Objective":  # the module of this name had it
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from selectkd.objective.objective import Objective

    warnings.warn("import Objective from selectkd", DeprecationWarning, stacklevel=2)
    return Objective
