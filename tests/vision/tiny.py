"""Tiny random models that see images, each with a processor of its own family, as folders; and images and records."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from selectkd.models.vision import without_video

QWEN = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
}  # fmt: skip
WINDOWED = "<|vision_start|><|image_pad|><|vision_end|>"
PLAIN = {"image_token": "<image>"}
TILED = {**PLAIN, "fake_image_token": "<fake_token_around_image>", "global_image_token": "<global-img>",
         **{f"row{i}{j}": f"<row_{i}_col_{j}>" for i in (1, 2) for j in (1, 2)}}  # fmt: skip
TOKENS: dict[str, dict[str, str]] = {
    "internvl": {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
                 "video_token": "<video>"},
    "qwen2_vl": QWEN, "qwen2_5_vl": QWEN, "qwen3_vl": QWEN,
    "idefics3": TILED, "smolvlm": TILED,
    "llava": PLAIN,
    "llava_onevision": {**PLAIN, "video_token": "<video>"},
    "paligemma": PLAIN,
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
}  # fmt: skip
FAMILIES = tuple(TOKENS)
WRITTEN = {
    "internvl": "<IMG_CONTEXT>", "gemma3": "<start_of_image>",
    "qwen2_vl": WINDOWED, "qwen2_5_vl": WINDOWED, "qwen3_vl": WINDOWED,
}  # fmt: skip
"""What a family's chat template writes for an image; elsewhere <image>."""
ROLES = ("<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VOCABULARY = 320
TOWER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "image_size": 16, "patch_size": 4}  # fmt: skip
GRID = [[16, 16], [16, 32], [32, 16], [32, 32]]


def tokenizer_of(family: str) -> Any:
    """A tokenizer of bytes with the family's own special tokens."""
    special = ["<pad>", "<s>", "</s>", *ROLES, *TOKENS[family].values()]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    named = {**TOKENS[family], "user": ROLES[0], "assistant": ROLES[1], "end": ROLES[2]}
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named,
    )
    if family != "paligemma":
        made.chat_template = TEMPLATE.replace("IMAGE", WRITTEN.get(family, "<image>"))
    return made


def processor_of(family: str, tokenizer: Any) -> Any:
    """The family's processor for images of a few patches."""
    square = {"height": 16, "width": 16}
    kinds: dict[str, Any] = {
        "internvl": lambda: without_video(hf.InternVLProcessor)(
            hf.GotOcr2ImageProcessorPil(size=square, min_patches=1, max_patches=4), tokenizer, image_seq_length=4
        ),
        "idefics3": lambda: hf.Idefics3Processor(
            hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
            tokenizer, image_seq_len=4,
        ),
        "smolvlm": lambda: without_video(hf.SmolVLMProcessor)(
            hf.SmolVLMImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}),
            tokenizer, None, image_seq_len=4,
        ),
        "llava": lambda: hf.LlavaProcessor(
            hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=square), tokenizer, patch_size=4,
            vision_feature_select_strategy="default", num_additional_image_tokens=1,
        ),
        "llava_onevision": lambda: without_video(hf.LlavaOnevisionProcessor)(
            hf.LlavaOnevisionImageProcessorPil(size=square, image_grid_pinpoints=GRID), tokenizer,
            num_image_tokens=16, vision_feature_select_strategy="full",
        ),
        "gemma3": lambda: hf.Gemma3Processor(hf.Gemma3ImageProcessorPil(size=square), tokenizer, image_seq_length=4),
    }  # fmt: skip
    if family in kinds:
        made = kinds[family]()
    elif family == "paligemma":
        images = hf.SiglipImageProcessorPil(size=square)
        images.image_seq_length = 16
        made = hf.PaliGemmaProcessor(images, tokenizer)
    else:
        size = {"shortest_edge": 64, "longest_edge": 1024}
        images = hf.Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, size=size)
        kind = {"qwen2_vl": hf.Qwen2VLProcessor, "qwen2_5_vl": hf.Qwen2_5_VLProcessor}.get(
            family, hf.Qwen3VLProcessor
        )
        made = without_video(kind)(images, tokenizer)
    made.chat_template = tokenizer.chat_template
    return made


def config_of(family: str, tokenizer: Any, layers: int = 2) -> Any:
    """The family's configuration, every size small."""
    text = {
        "vocab_size": 1416 if family == "paligemma" else VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024, "head_dim": 8,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip

    def of(name: str) -> int:
        return tokenizer.convert_tokens_to_ids(name)

    siglip = {"model_type": "siglip_vision_model", **TOWER, "vision_use_head": False}
    if family == "internvl":
        tower = {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]}
        return hf.InternVLConfig(
            vision_config=tower, text_config={"model_type": "qwen2", **text}, image_token_id=of("<IMG_CONTEXT>"),
            image_seq_length=4, downsample_ratio=0.5,
        )  # fmt: skip
    if family.startswith("qwen"):
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
        ids = {f"{name}_id": of(QWEN[name]) for name in QWEN}
        tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "num_heads": 2,
                 "patch_size": 4}  # fmt: skip
        if family == "qwen2_vl":
            tower = {
                "depth": 2,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "mlp_ratio": 2,
            }
            return hf.Qwen2VLConfig(vision_config=tower, text_config={**text, "rope_parameters": rope}, **ids)
        if family == "qwen2_5_vl":
            tower |= {"window_size": 16, "fullatt_block_indexes": [1]}
            return hf.Qwen2_5_VLConfig(
                vision_config=tower, text_config={**text, "rope_parameters": rope}, **ids
            )
        tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        rope["mrope_interleaved"] = True
        return hf.Qwen3VLConfig(vision_config=tower, text_config={**text, "rope_parameters": rope}, **ids)
    if family in ("idefics3", "smolvlm"):
        return (hf.Idefics3Config if family == "idefics3" else hf.SmolVLMConfig)(
            vision_config=TOWER, text_config={"model_type": "llama", **text}, image_token_id=of("<image>"),
            scale_factor=2, pad_token_id=0,
        )  # fmt: skip
    if family == "llava":
        return hf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **TOWER}, text_config={"model_type": "llama", **text},
            image_token_id=of("<image>"), image_seq_length=16, vision_feature_layer=-1,
        )  # fmt: skip
    if family == "llava_onevision":
        return hf.LlavaOnevisionConfig(
            vision_config=siglip, text_config={"model_type": "qwen2", **text}, image_token_id=of("<image>"),
            video_token_id=of("<video>"), image_grid_pinpoints=GRID,
        )  # fmt: skip
    if family == "paligemma":
        return hf.PaliGemmaConfig(
            vision_config=siglip, text_config={"model_type": "gemma", **text}, image_token_id=of("<image>"),
            projection_dim=32,
        )  # fmt: skip
    return hf.Gemma3Config(
        vision_config=siglip, text_config={**text, "sliding_window": 64, "query_pre_attn_scalar": 8},
        mm_tokens_per_image=4, image_token_index=of("<image_soft_token>"), boi_token_index=of("<start_of_image>"),
        eoi_token_index=of("<end_of_image>"),
    )  # fmt: skip


def model_of(config: Any, seed: int = 0) -> Any:
    """A random model whose answer depends on all that it reads."""
    torch.manual_seed(seed)
    model = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model.eval()


def saved(family: str, folder: Path, *, seed: int = 0, layers: int = 2) -> Path:
    """A model of a family with its processor, as a folder."""
    tokenizer = tokenizer_of(family)
    processor = processor_of(family, tokenizer)
    model_of(config_of(family, tokenizer, layers), seed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def picture(seed: int, width: int = 24, height: int = 20) -> Image.Image:
    """An image of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    """An image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def asks(question: str, answer: str, *images: str) -> dict[str, Any]:
    """A record that asks about images by their paths."""
    parts = [{"type": "image", "image": path} for path in images]
    asked = [*parts, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def written(folder: Path, records: Sequence[Any], name: str = "data.jsonl") -> Path:
    """Records as a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def data(folder: Path, *, text: bool = True) -> Path:
    """Six records: of one image, of two of other sizes, and, with ``text``, two without any."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate(((24, 20), (18, 40), (30, 16), (16, 16))):
        picture(index, *size).save(folder / f"{index}.png")
    records = [
        asks("what is it", "a cat", "0.png"),
        asks("which is larger", "the second one", "1.png", "2.png"),
        asks("what is it", "a dog on a sofa", "3.png"),
        asks("how many", "2", "1.png"),
    ]
    plain = [
        {"messages": [{"role": "user", "content": "say hi"}, {"role": "assistant", "content": "hi"}]},
        {
            "messages": [
                {"role": "user", "content": "2 + 2"},
                {"role": "assistant", "content": "the sum is 4"},
            ]
        },
    ]
    return written(folder, [records[0], *plain[:text], *records[1:3], *plain[1 : 1 + text], records[3]])


def bare(folder: Path) -> Path:
    """``data`` for a model without a chat template (PaliGemma): prompt, completion and one image or two."""
    data(folder)
    records = [
        {"prompt": "what is it", "completion": "a cat", "image": "0.png"},
        {"prompt": "which is larger", "completion": "the second one", "images": ["1.png", "2.png"]},
        {"prompt": "what is it", "completion": "a dog on a sofa", "image": "3.png"},
        {"prompt": "how many", "completion": "2", "image": "1.png"},
    ]
    return written(folder, records)
