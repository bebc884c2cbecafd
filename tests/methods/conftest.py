"""A tiny pair on disk and recipes for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from selectkd.config import recipe_from
from training.tiny import tiny_llama, write_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: Any) -> Path:
    """A teacher, a student and 24 texts on disk."""
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=3))
    return root


@pytest.fixture
def recipe(pair: Path, tmp_path: Path) -> Callable[..., Any]:
    """recipe(method="kd", training={...}): a recipe for the pair, sections joined, anything else as given."""

    def made(**changed: Any) -> Any:
        content: dict[str, Any] = {
            "teacher": {"model": str(pair / "teacher")},
            "student": {"model": str(pair / "student")},
            "data": {"sources": [{"path": str(pair / "text.jsonl"), "name": "made"}], "evaluation": 0.25},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "max_steps": 2,
                "batch_size": 3,
                "learning_rate": 1e-2,
                "max_length": 24,
                "max_prompt_length": 12,
                "evaluate_every": 1,
                "probe_samples": 0,
            },
        }
        for key, value in changed.items():
            old = content.get(key)
            content[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
        return recipe_from(content)

    return made
