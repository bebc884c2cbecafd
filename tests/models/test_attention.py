"""How a model computes attention: by a way that is installed, never by a kernel from the hub."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from selectkd.config import recipe_from
from selectkd.errors import ConfigError
from selectkd.models.load import load_model
from selectkd.training.checks import prepare
from training.tiny import recipe_of, tiny_llama, write_pair


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    write_pair(tmp_path, tiny_llama(1))
    return tmp_path


def recipe(pair: Path, *, data: Any = None, **kinds: str) -> Any:
    content = recipe_of(
        pair, data=data, training={"output_dir": str(pair / "run"), "max_steps": 1, "batch_size": 2}
    )
    for section, kind in kinds.items():
        content[section]["attn_implementation"] = kind
    return recipe_from(content)


def edit(pair: Path, change: dict[str, Any]) -> None:
    path = pair / "student" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


@pytest.mark.parametrize("kind", ["eager", "sdpa", "flex_attention"])
def test_a_recipe_chooses_how_each_model_computes_attention(kind: str, pair: Path) -> None:
    plan = prepare(recipe(pair, student="eager", teacher=kind))
    assert plan.teacher.loaded().model.config._attn_implementation == kind


def test_a_models_head_is_checked_without_its_attention_kernel(pair: Path, monkeypatch: Any) -> None:
    """A model is loaded on the CPU, where flash attention crashes and flex attention may be wrong."""

    def kernel(*_: Any, **__: Any) -> Any:
        raise AssertionError("the kernel ran")

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", kernel)
    loaded = load_model(pair / "student", attn_implementation="flex_attention")
    assert loaded.model.config._attn_implementation == "flex_attention"
    with pytest.raises(AssertionError, match="the kernel ran"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of transformers' own call of torch
        loaded.model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize("section", ["student", "teacher"])
@pytest.mark.parametrize(
    "kind", ["kernels-community/flash-attn3", "org/kernel@main:run", "paged|sdpa", "fast"]
)
def test_a_recipe_cannot_name_a_kernel_of_the_hub(kind: str, section: str, pair: Path) -> None:
    with pytest.raises(ConfigError, match=f"{section}.attn_implementation = '.*must be 'eager', 'sdpa'"):
        recipe(pair, **{section: kind})


@pytest.mark.parametrize("section", ["student", "teacher"])
@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_3"])
def test_attention_that_is_not_installed_is_refused_before_a_weight_loads(
    kind: str, section: str, pair: Path
) -> None:
    """transformers would look for a kernel on the hub."""
    (pair / section / "model.safetensors").unlink()
    with pytest.raises(
        ConfigError, match=rf"{section}.attn_implementation = '{kind}' needs the package flash_attn"
    ):
        prepare(recipe(pair, **{section: kind}))


@pytest.mark.parametrize(
    "change",
    [
        {"attn_implementation": "kernels-community/flash-attn3"},
        {"_attn_implementation": "org/kernel"},
        {"_attn_implementation_internal": "org/kernel:function"},
        {"attn_implementation": {"": "sdpa", "text_config": "org/kernel"}},
        {"text_config": {"attn_implementation": "org/kernel"}},
        {"layers": [{"experts_implementation": "org/kernel"}]},
        {"attn_implementation": "paged|org/kernel"},
    ],
)
def test_a_folder_cannot_name_a_kernel_of_the_hub(change: dict[str, Any], pair: Path) -> None:
    edit(pair, change)
    (pair / "student" / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(ConfigError, match=r"config.json asks for the kernel '.*code from elsewhere"):
        load_model(pair / "student")


@pytest.mark.parametrize("kind", ["flash_attention_2", "flash_attention_4", "fast"])
def test_a_folder_cannot_ask_for_attention_that_is_not_here(kind: str, pair: Path) -> None:
    edit(pair, {"attn_implementation": kind})
    with pytest.raises(ConfigError, match=rf"config.json: attn_implementation = '{kind}'"):
        load_model(pair / "student")
    assert (
        load_model(pair / "student", attn_implementation="eager").model.config._attn_implementation == "eager"
    )


def test_attention_that_the_model_does_not_know_is_refused_by_name(pair: Path) -> None:
    edit(pair, {"model_type": "xlm", "n_layers": 1})
    with pytest.raises(ConfigError, match=r"'flex_attention' is not known to XLM.*Use one of: eager"):
        load_model(pair / "student", attn_implementation="flex_attention")
