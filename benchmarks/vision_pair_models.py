"""The vision-language pair's models: InternVLs of about a million parameters, their tokenizer, and how they learn.

A model is shown drawn scenes of 64 x 64 pixels and one question about each, and learns the answer's tokens alone. Every
training scene is drawn as it is needed, so that none is seen twice.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from lab_models import Course, Material, follow
from PIL import Image
from torch import Tensor

from selectkd.evals.vision.scenes import TASKS, Scene, scene
from selectkd.evals.vision.synthetic import asked_about
from selectkd.models.cut import cut_student
from selectkd.models.load import load_model
from selectkd.models.vision import without_video

SIZE, PATCH, SEEN = 64, 8, 16
"""Pixels across an image and a patch, and the tokens of an image: four patches become one."""
BATCH = 32
DESCRIBE = "Describe the image."
USER, ASSISTANT, END, IMAGE = "<|user|>", "<|assistant|>", "<|end|>", "<image>"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PIECES = r"\n[A-D]\. |\n[^\n]+$|[A-Z][a-z]+| ?[a-z]+| ?[A-Z0-9]|[^A-Za-z0-9]"
"""What a token never crosses: an option's letter, what is to be answered, a word, a capital or a digit by itself."""


@dataclass(frozen=True)
class Size:
    """Width and layers of the tower, width and layers of the language model."""

    tower: int
    tower_layers: int
    width: int
    layers: int


def texts_of(scenes: int = 300) -> list[str]:
    """The questions and answers of some training scenes of every task."""
    return [
        text
        for task in TASKS
        for index in range(scenes)
        for one in [scene(task, index, split="train", size=SIZE)]
        for pair in [*asked_about(one, b"", answers="text"), (DESCRIBE, one.caption)]
        for text in pair
    ]


def tokenizer_of(texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer in which the words of the questions are one token each."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<pad>", USER, ASSISTANT, END, "<img>", "</img>", IMAGE, "<video>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PIECES), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    core.train_from_iterator(texts, trainer)
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": IMAGE,
             "video_token": "<video>"}  # fmt: skip
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token=END, extra_special_tokens=names
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def processor_of(tokenizer: Any) -> Any:
    """InternVL's processor for images of one tile."""
    images = hf.GotOcr2ImageProcessorPil(size={"height": SIZE, "width": SIZE}, crop_to_patches=False)
    made = without_video(hf.InternVLProcessor)(images, tokenizer, image_seq_length=SEEN)
    made.chat_template = tokenizer.chat_template
    return made


def model_of(size: Size, tokenizer: Any, seed: int) -> Any:
    """An InternVL of random weights with tied embeddings."""
    torch.manual_seed(seed)
    tower = {
        "hidden_size": size.tower, "intermediate_size": 3 * size.tower, "num_hidden_layers": size.tower_layers,
        "num_attention_heads": 4, "image_size": [SIZE, SIZE], "patch_size": [PATCH, PATCH],
        "layer_scale_init_value": 1.0,
    }  # fmt: skip
    text = {
        "model_type": "qwen2", "vocab_size": len(tokenizer), "hidden_size": size.width,
        "intermediate_size": 3 * size.width, "num_hidden_layers": size.layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = hf.InternVLConfig(
        vision_config=tower, text_config=text, image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=SEEN, downsample_ratio=0.5, tie_word_embeddings=True,
    )  # fmt: skip
    model = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # transformers' .02 is for large models: with it these learn to see far later
                weight.normal_(std=0.5 if "position" in name else weight[0].numel() ** -0.5)
    return model


def part_of(teacher: Path, layers: int, tower_layers: int) -> Any:
    """A copy of the teacher with evenly spaced layers of its language model and the first ones of its tower."""
    model, _, _ = cut_student(load_model(teacher).model, layers, "even")
    plain: Any = model
    tower = plain.model.vision_tower
    tower.encoder.layer = tower.encoder.layer[:tower_layers]
    plain.config.vision_config.num_hidden_layers = tower_layers
    return plain.requires_grad_(True)


def example(one: Scene, seed: int, kind: int) -> tuple[Image.Image, str, str]:
    """(image, question, answer) of a scene: kind 0 has options, 1 is a statement, 2 asks for all that is drawn."""
    image = one.draw()
    asked = [*asked_about(one, image, seed=seed, answers="text"), (DESCRIBE, one.caption)]
    return Image.open(io.BytesIO(image)), *asked[kind]


def inputs_of(processor: Any, examples: Sequence[tuple[Image.Image, str, str]]) -> dict[str, Tensor]:
    """The model's inputs of a batch and its labels, -100 but at the answers."""
    texts = [f"{USER}{IMAGE}{question}{END}{ASSISTANT}{answer}{END}" for _, question, answer in examples]
    batch = processor(text=texts, images=[one for one, _, _ in examples], padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    turn = ids == processor.tokenizer.convert_tokens_to_ids(ASSISTANT)
    answer = (turn.cumsum(-1) > 0) & ~turn & (batch["attention_mask"] == 1)
    return {**batch, "labels": torch.where(answer, ids, -100)}


def scenes_from(processor: Any, seed: int, start: int) -> Iterator[dict[str, Tensor]]:
    """Batches of scenes of all tasks in turn, from step ``start`` on, without end.

    A batch has questions of one kind, which are about as long. The descriptions teach the tower: they name all of it.
    """
    names = list(TASKS)
    for step in count(start):
        scenes = [
            scene(names[i % len(names)], i // len(names), seed=seed, split="train", size=SIZE)
            for i in range(step * BATCH, (step + 1) * BATCH)
        ]
        yield inputs_of(processor, [example(one, seed, step % 3) for one in scenes])


def train(folder: Path, model: Any, processor: Any, course: Course, heldout: int = 40) -> None:
    """Trains a model on scenes drawn from its course's seed; held out are ``heldout`` scenes of each task."""
    held = [scene(task, i, split="heldout", size=SIZE) for task in TASKS for i in range(heldout)]
    asked = [example(one, 0, kind) for kind in (0, 1) for one in held]
    looks = [inputs_of(processor, asked[i : i + 50]) for i in range(0, len(asked), 50)]

    def loss(batch: dict[str, Tensor], step: int) -> tuple[Tensor, int]:
        return model(**batch, use_cache=False).loss, int((batch["labels"] != -100).sum())

    @torch.no_grad()
    def heldout_loss() -> float:
        model.eval()
        found = [loss(one, 0) for one in looks]
        model.train()
        return sum(float(value) * tokens for value, tokens in found) / sum(tokens for _, tokens in found)

    def save(part: Path) -> None:
        model.save_pretrained(part)
        processor.save_pretrained(part)

    model.train()
    follow(
        folder,
        model,
        course,
        Material(lambda start: scenes_from(processor, course.seed, start), loss, heldout_loss, save),
    )
