"""The doctor proves that images reach the loss, and says what to look at where they do not."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf
from transformers.models.internvl.modeling_internvl import InternVLModel

from selectkd.config import load_recipe
from selectkd.models import vision
from selectkd.training.preflight.doctor import doctor
from vision.conftest import Recipes


@pytest.fixture(autouse=True)
def processors_are_read_again() -> Any:
    vision._vision_of.cache_clear()
    yield
    vision._vision_of.cache_clear()


def findings(path: str) -> dict[str, Any]:
    return {finding.check: finding for finding in doctor(load_recipe(path, []), device="cpu")}


def test_images_that_reach_the_models_move_their_rows(recipe: Recipes) -> None:
    found = findings(recipe())
    assert all(one.ok for one in found.values()), found
    assert "the teacher's rows move by" in found["images"].message
    assert "5 images of 6 to 14 tokens" in found["images"].message


def test_a_processor_that_drops_images_is_caught(recipe: Recipes, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = hf.InternVLProcessor.__call__

    def dropping(self: Any, *given: Any, **named: Any) -> Any:
        answer = whole(self, *given, **named)
        answer.pop("pixel_values", None)
        return answer

    monkeypatch.setattr(hf.InternVLProcessor, "__call__", dropping)
    found = findings(recipe())["images"]
    assert not found.ok and found.exit_code == 2 and "processor_config.json" in found.message


def test_a_placeholder_that_is_widened_twice_is_caught(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = hf.InternVLProcessor.replace_image_token

    def twice(self: Any, *given: Any, **named: Any) -> str:
        text = once(self, *given, **named)
        return text.replace(self.image_token, 2 * self.image_token)

    monkeypatch.setattr(hf.InternVLProcessor, "replace_image_token", twice)
    found = findings(recipe())["images"]
    assert not found.ok and found.exit_code == 2 and "widened twice" in found.message


def test_a_model_that_reads_its_text_alone_is_caught(
    recipe: Recipes, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = InternVLModel.forward

    def blind(self: Any, *given: Any, **named: Any) -> Any:
        return whole(self, *given, **{**named, "pixel_values": None})

    monkeypatch.setattr(InternVLModel, "forward", blind)
    found = findings(recipe())["images"]
    assert not found.ok and found.exit_code == 2 and "they do not reach it" in found.message
