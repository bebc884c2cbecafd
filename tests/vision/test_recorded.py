"""What vLLM 0.32.0 answered to prompts with images, recorded on a processor from a random Qwen2.5-VL in float32."""

from __future__ import annotations

import json
from typing import Any

import pytest

from selectkd.data.example import Example
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.text_cache import TextCache
from selectkd.models.load import load_model, load_vision
from selectkd.teachers.remote import vllm_images
from selectkd.teachers.remote.answers import TopKRequest, WrongAnswer, stated_limit
from vision import tiny
from vision.served import RECORDED

K = RECORDED["k"]


@pytest.fixture(scope="module")
def samples(folder_of: Any, tmp_path_factory: Any) -> dict[str, Example]:
    """The samples that were asked about, as our processor widens them."""
    folder, place = folder_of(RECORDED["family"]), tmp_path_factory.mktemp("asked")
    examples = dataset_source(
        {"path": str(tiny.data(place))},
        load_model(folder).tokenizer,
        TextRules(900),
        vision=load_vision(folder),
        cache=TextCache(place / "cache", 1),
    ).examples
    one, two, *_ = [example for example in examples if example.images and example.images.refs]
    return {"one image": one, "two images": two}


def request_of(example: Example) -> TopKRequest:
    return TopKRequest(example.input_ids, range(len(example) - 1), K, tiny.VOCABULARY, images=example.images)


@pytest.mark.parametrize("name", ["one image", "two images"])
def test_our_prompt_is_what_was_asked_and_the_answer_has_its_rows(
    samples: dict[str, Example], name: str
) -> None:
    request = request_of(samples[name])
    body, asked = vllm_images.body(request, "tiny"), RECORDED["asked"][name]
    assert body["token_ids"] == asked["token_ids"] and len(body["content_parts"]) == asked["images"]
    status, answer = RECORDED["answered"][name]
    assert status == 200
    rows = vllm_images.read(json.dumps(answer).encode(), request)
    assert rows.ids.shape == (len(request.ids) - 1, K)
    for at, ids, logp in zip(request.places, rows.ids.tolist(), rows.logp.tolist(), strict=True):
        told = {int(key): entry["logprob"] for key, entry in answer["prompt_logprobs"][at + 1].items()}
        assert set(ids) == set(sorted(told, key=told.__getitem__, reverse=True)[:K])
        assert logp == pytest.approx([told[one] for one in ids])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("widened by us too", "the server read 71 tokens .*, 34 of them for images; the student's processor makes 55"),
        ("one image left out", "was shown 1 images of the 2"),
        ("widened and no image", "was shown 0 images of the 2"),
    ],
)  # fmt: skip
def test_an_answer_to_another_prompt_is_refused(samples: dict[str, Example], name: str, told: str) -> None:
    status, answer = RECORDED["answered"][name]
    assert status == 200, "the server itself finds nothing wrong"
    request = request_of(samples["two images"])
    if name == "widened and no image":
        assert answer["prompt_token_ids"] == list(request.ids), "equal ids alone prove nothing"
    with pytest.raises(WrongAnswer, match=told):
        vllm_images.read(json.dumps(answer).encode(), request)


def test_images_that_change_places_or_lose_them_are_refused(samples: dict[str, Example]) -> None:
    _, answer = RECORDED["answered"]["two images"]
    request = request_of(samples["two images"])
    for change in ({"offset": 1}, {"length": 9}, {"offset": 13, "length": 9}):
        other = json.loads(json.dumps(answer))
        other["mm_placeholders"]["image"][0].update(change)
        with pytest.raises(WrongAnswer, match=r"the server put .* at the tokens"):
            vllm_images.read(json.dumps(other).encode(), request)
    for strange in ("image", [1], {"image": 5}, {"image": [{"offset": 2}]}):
        other = {**answer, "mm_placeholders": strange}
        with pytest.raises(WrongAnswer):
            vllm_images.read(json.dumps(other).encode(), request)


def test_the_servers_own_refusals_are_understood() -> None:
    status, refused = RECORDED["answered"]["too many log-probabilities"]
    assert status == 400 and stated_limit(refused["error"]["message"]) == (1000, 400)
    assert RECORDED["answered"]["one image too many"][0] == 500
