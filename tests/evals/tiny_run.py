"""One short run of a tiny pair, which evaluations and speculation look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.config import load_recipe
from selectkd.training.run import train
from training.tiny import recipe_of, tiny_llama, write_pair


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: Any) -> Path:
    """A run folder of 12 steps, looked at every second; its teacher and text lie beside it."""
    root = tmp_path_factory.mktemp("evals")
    write_pair(root, tiny_llama(1, layers=3))
    recipe = {
        **recipe_of(root, data={"evaluation": 0.25}),
        "objective": {"verifier": {"name": "greedy_topk", "k": 5}, "beta": 1.0},
        "training": {
            "output_dir": str(root / "run"), "max_steps": 12, "batch_size": 6, "learning_rate": 1e-2,
            "max_length": 32, "max_prompt_length": 16, "evaluate_every": 2,
        },
    }  # fmt: skip
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    train(load_recipe(root / "recipe.yaml", []))
    return root / "run"
