from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from selectkd.data.render import TextRules
from selectkd.data.sources import Source, dataset_source
from selectkd.data.text_cache import TextCache
from selectkd.models.load import load_tokenizer, load_vision
from vision import tiny


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny model of a family, made once for each seed and number of layers."""
    made: dict[tuple[str, int, int], Path] = {}

    def of(family: str, seed: int = 0, layers: int = 2) -> Path:
        key = (family, seed, layers)
        if key not in made:
            made[key] = tiny.saved(family, tmp_path_factory.mktemp(family), seed=seed, layers=layers)
        return made[key]

    return of


@pytest.fixture(scope="module")
def read(folder_of: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Source]:
    """Reads records with the images 0.png to 3.png beside them."""
    folder = folder_of("internvl")
    tokenizer, vision = load_tokenizer(folder), load_vision(folder)

    def of(*records: Any, length: int = 400, template: Any = None, entry: Any = (), **rules: Any) -> Source:
        where = tmp_path_factory.mktemp("records")
        tiny.data(where)
        path = tiny.written(where, records)
        cache = TextCache.at(where / "cache", workers=1)
        spec = {"path": str(path), **dict(entry)}
        text = TextRules(length, **rules)
        return dataset_source(spec, tokenizer, text, vision=vision, cache=cache, template=template)

    return of


Recipes = Callable[..., str]


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.data(tmp_path_factory.mktemp("images"))


@pytest.fixture
def recipe(folder_of: Any, records: Path, tmp_path: Path) -> Recipes:
    """Writes a recipe and returns its path; ``family`` is that of both models."""

    def write(run: str = "run", family: str = "internvl", **sections: Any) -> str:
        content: dict[str, Any] = {
            "teacher": {"model": str(folder_of(family, 1))},
            "student": {"model": str(folder_of(family, 2))},
            "data": {"sources": [{"path": str(records)}], "cache": str(tmp_path / "text"), "workers": 0},
            "training": {
                "output_dir": str(tmp_path / run), "max_steps": 2, "batch_size": 2, "max_length": 400,
                "learning_rate": 1e-2, "warmup_ratio": 0.0, "save_every": None, "precision": "fp32", "probe_samples": 2,
            },
        }  # fmt: skip
        for name, section in sections.items():
            keep = name in ("data", "training")
            content[name] = {**content[name], **section} if keep else section
        path = tmp_path / f"{run}.yaml"
        path.write_text(yaml.safe_dump(content), "utf-8")
        return str(path)

    return write
