"""A tiny pair on disk, and caches of its teacher."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.config import load_recipe
from training.tiny import tiny_llama, write_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: Any) -> Path:
    """A teacher, a student and 24 texts on disk."""
    root = tmp_path_factory.mktemp("pair")
    write_pair(root, tiny_llama(1, layers=3, hidden=48))
    return root


@pytest.fixture
def recipe(pair: Path, tmp_path: Path) -> Callable[..., str]:
    """The path of a recipe for the tiny pair: recipe(teacher={...}, objective={...}, run="name")."""

    def made(teacher: dict[str, Any], objective: dict[str, Any] | None = None, run: str = "run") -> str:
        content = {
            "teacher": teacher,
            "student": {"model": str(pair / "student")},
            "data": {"sources": [{"path": str(pair / "text.jsonl"), "name": "made"}], "evaluation": 0.25},
            "objective": objective or {"verifier": {"name": "greedy_topk", "k": 5}, "beta": 0.1},
            "training": {
                "output_dir": str(tmp_path / run),
                "max_steps": 6,
                "batch_size": 3,
                "learning_rate": 1e-2,
                "max_length": 32,
                "max_prompt_length": 16,
                "evaluate_every": 3,
            },
        }
        path = tmp_path / f"{run}.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        load_recipe(path, [])
        return str(path)

    return made
