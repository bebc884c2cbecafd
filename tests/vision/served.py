"""A tiny model that sees images behind the format of vLLM's ``/inference/v1/generate``.

The format is that of vLLM 0.32.0, as ``vllm_0_32_images.json`` recorded it: prompts come with one placeholder for each
image, which the server's own processor widens, one after the other, each behind the last; placeholders that are left
over stay text, images that are left over are an error.
"""

from __future__ import annotations

import base64
import io
import json
import threading
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.data.images import ImageRules, found
from selectkd.data.vision import Images
from selectkd.models.load import load_model, load_vision
from selectkd.rollouts.generate import Request, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from teachers.served import Answer, Served, vllm

RECORDED: Any = json.loads(Path(__file__).with_name("vllm_0_32_images.json").read_text("utf-8"))

Slip = Literal["twice", "dropped", "blind", "white", "silent"]
"""twice: placeholders are widened again; dropped: the last image is; blind: ids are widened and no image is read;
white: every image becomes a blank one; silent: the answer does not say what was read."""


class ServedImages(Served):
    """A model and its processor as vLLM serves them. slip: what the server does wrong; on: whether it was started with
    --enable-scale-out; folder: where it loads its model anew.
    """

    def __init__(
        self,
        model: Any,
        vision: Any,
        *,
        slip: Slip | None = None,
        on: bool = True,
        folder: Path | None = None,
    ) -> None:
        self.tokens = len(vision.processor.tokenizer)  # the head has rows beyond them
        super().__init__(model, "vllm", limit=self.tokens)
        self.vision, self.slip, self.on, self.folder = vision, slip, on, folder
        self.one_at_a_time = threading.Lock()  # a model of Qwen's keeps the places of the text it read last

    def plain(self, path: str, content: bytes) -> Answer:
        if path == "/v1/models":
            return _json({"object": "list", "data": [{"id": "tiny", "max_model_len": 512}]})
        if path == "/collective_rpc" and self.folder is not None:
            self.model, self.vision = load_model(self.folder).model, load_vision(self.folder)
            return _json({"results": [None]})
        if path in ("/reset_prefix_cache", "/reset_encoder_cache"):
            return _json({})
        if path == "/v1/completions" and "prompt_logprobs" not in (asked := json.loads(content)):
            text = self.written(asked["prompt"], self.shown([], [], len(asked["prompt"])), asked)
            return _json({"choices": [{"text": "", **text}]})
        if path != "/inference/v1/generate":
            return super().plain(path, content)
        if not self.on:
            status, refused = RECORDED["answered"]["without --enable-scale-out"]
            return _json(refused, status)
        asked = json.loads(content)
        sampling = asked["sampling_params"]
        shown = [_image(part) for part in asked.get("content_parts", ())]
        if self.slip == "dropped":
            shown = shown[:-1]
        read = self.widened(asked["token_ids"], shown)
        if read is None:
            return _json({"error": {"message": "Failed to apply prompt replacement", "code": 500}}, 500)
        ids, places = read
        if self.slip == "blind":
            shown, places = [], []
        if self.slip == "white":
            shown = [Image.new("RGB", image.size, "white") for image in shown]
        given = {"image": [{"offset": begin, "length": end - begin} for begin, end in places]}
        told = (
            {"prompt_token_ids": ids, "mm_placeholders": given if places else None}
            if asked.get("return_token_ids") and self.slip != "silent"
            else {}
        )
        images = self.shown(shown, places, len(ids))
        with self.one_at_a_time:
            if "prompt_logprobs" not in sampling:
                return _json({"choices": [self.written(ids, images, sampling)], **told})
            answer = vllm(ids, self.rows(ids, images), sampling["prompt_logprobs"])
        rows = answer["choices"][0].pop("prompt_logprobs")
        del answer["choices"][0]["prompt_token_ids"]
        return _json({**answer, "prompt_logprobs": rows, "output_mode": "tokens", **told})

    def widened(self, ids: list[int], shown: list[Any]) -> Any:
        """The ids with the tokens of the images, and where these stand; None where an image has no placeholder."""
        ids, places, start = list(ids), [], 0
        marker = self.vision.placeholder_id
        for image in shown:
            if marker not in ids[start:]:
                return None
            begin = ids.index(marker, start)
            text = self.vision.placeholder
            answer = self.vision.processor(text=[text], images=[image], add_special_tokens=False)
            tokens = list(answer["input_ids"][0])
            if self.slip == "twice":
                tokens += [one for one in tokens if one in self.vision.image_ids]
            ids[begin : begin + 1] = tokens
            start = begin + len(tokens)
            places.append((begin, start))
        return ids, places

    @torch.no_grad()
    def logp(self, ids: list[int], temperature: float) -> Any:
        with self.one_at_a_time:
            return self.rows(ids, self.shown([], [], len(ids)))

    def shown(self, shown: list[Any], places: list[tuple[int, int]], length: int) -> Images:
        """The images of a prompt of so many tokens."""
        refs = tuple(found(image, ImageRules(), "an image").packed() for image in shown)
        return Images(refs, b"", tuple(place for span in places for place in span), length, self.vision)

    def written(self, ids: list[int], images: Images, sampling: dict[str, Any]) -> dict[str, Any]:
        """A choice whose tokens the model writes."""
        if self.slip == "twice":
            return {"index": 0, "finish_reason": "length", "token_ids": [20]}
        rule = Draw(Sampling(sampling.get("temperature", 1.0), sampling.get("top_p", 1.0)))
        request = Request(ids, sampling["max_tokens"], images=images)
        (text,) = generate([self.model], [request], rule, ends={2}, width=self.tokens)
        return {"index": 0, "finish_reason": "stop" if text.ended else "length", "token_ids": text.ids}

    @torch.no_grad()
    def rows(self, ids: list[int], images: Images) -> Any:
        """Log-probabilities of the next token after each token, [t, v]."""
        example = Example(ids, [False] * len(ids), images=images)
        batch = collate([example], pad_id=0, pad_to_multiple_of=1)
        if self.slip == "twice":  # more tokens than features: the numbers do not matter
            return torch.zeros(len(ids), self.tokens).log_softmax(-1)
        return self.model(**batch.model_inputs()).logits[0, :, : self.tokens].log_softmax(-1)


def _image(part: dict[str, Any]) -> Any:
    assert part["type"] == "image_url" and part["url"].startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(part["url"].partition(",")[2]))).convert("RGB")


def _json(content: dict[str, Any], status: int = 200) -> Answer:
    return status, {"content-type": "application/json"}, json.dumps(content).encode()
