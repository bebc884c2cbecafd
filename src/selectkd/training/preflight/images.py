"""Whether images reach the loss: with an image blanked or its pixels shuffled, a model's rows must move.

n supervised rows of the samples with images, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from selectkd.data.collate import Batch, collate, repainted
from selectkd.data.images import pillow
from selectkd.data.render import pad_id_of
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.models.forward import evaluating, hidden_rows
from selectkd.models.head import head_of
from selectkd.teachers.live import HeldModel
from selectkd.teachers.remote.fingerprint import difference
from selectkd.teachers.remote.teacher import RemoteTeacher, samples_of
from selectkd.training.assembly import Assembly

SAMPLES = 4
"""Samples with images that are looked at."""
FAINT = 1e-3
"""Nats by which a row moves at least where its image says anything."""


def images_matter(assembly: Assembly) -> str:
    """What the images of a few samples are worth to teacher and student, in nats a row.

    ConfigError where a model's rows are the same whatever it is shown, and where its processor makes no pixels.
    """
    batch = _with_images(assembly)
    if batch is None:
        return "no sample of the first ones has an image"
    counts = [end - begin for one in batch.images if one is not None for begin, end in one.places]
    found = [f"{len(counts)} images of {min(counts)} to {max(counts)} tokens"]
    teacher = assembly.teacher
    if isinstance(teacher, HeldModel):
        teacher.place(batch.input_ids.device)
        found.append(f"the teacher's rows move by {moved(teacher.model, batch, 'the teacher')}")
    elif isinstance(teacher, RemoteTeacher):
        found.append(f"the server's best tokens move by {answers_moved(teacher, batch)}")
    found.append(f"the student's by {moved(assembly.student, batch, 'the student')}")
    if not isinstance(teacher, HeldModel | RemoteTeacher):
        found.append("the teacher's own rows are looked at where they are made")
    return "; ".join(found)


def answers_moved(teacher: RemoteTeacher, batch: Batch) -> str:
    """The most nats by which a server's best tokens move with other images; ConfigError where none moves."""
    samples, _ = samples_of(batch, supervised(batch).position)
    seen = teacher.server.top_k(samples)
    nats = []
    for change in (_blank, _shuffled):
        others, _ = samples_of(repainted(batch, change), supervised(batch).position)
        answers = teacher.server.top_k(others)
        nats.append(max(difference(one, other) for one, other in zip(seen, answers, strict=True)))
    if not any(nats):
        raise ConfigError(
            "the server gives the same rows with its images blanked and shuffled: they do not reach its model. Look at "
            "the model that it serves, and at its processor."
        )
    return _sentence(nats)


def moved(model: nn.Module, batch: Batch, who: str) -> str:
    """The mean KL(rows || rows with other images) of a model, blank and shuffled; ConfigError where none moves."""
    if "pixel_values" not in batch.extra:
        raise ConfigError(
            f"the processor makes no pixels of {who}'s images, so text alone would be trained on. Look at "
            "processor_config.json and preprocessor_config.json in its folder."
        )
    position = supervised(batch).position
    with evaluating(model), torch.no_grad():
        seen = hidden_rows(model, batch, position)  # [n, d]
        blank, shuffled = (
            hidden_rows(model, repainted(batch, change), position) for change in (_blank, _shuffled)
        )
    nats = [_divergence(model, seen, other) for other in (blank, shuffled)]
    if not any(bool((seen != other).any()) for other in (blank, shuffled)):
        raise ConfigError(
            f"{who} gives the same rows with its images blanked and shuffled: they do not reach it. Look at its "
            "processor, its chat template, and whether its folder is a model that sees images."
        )
    return _sentence(nats)


def _sentence(nats: Sequence[float]) -> str:
    faint = "" if max(nats) >= FAINT else ", which is next to nothing: are the images those of the questions?"
    return f"{nats[0]:.3g} nats with blank images, {nats[1]:.3g} with shuffled ones{faint}"


def _with_images(assembly: Assembly) -> Batch | None:
    """The first samples with images, held out or trained on."""
    chosen: list[Any] = []
    for source in assembly.sources:
        for place in range(min(len(source.examples), 64)):
            example = source.examples[place]
            if example.images is not None and example.images.refs and len(chosen) < SAMPLES:
                chosen.append(example)
    if not chosen:
        return None
    device = next(assembly.student.parameters()).device
    return collate(chosen, pad_id=pad_id_of(assembly.tokenizer)).to(device)


@torch.no_grad()
def _divergence(model: nn.Module, seen: Tensor, other: Tensor) -> float:
    head = head_of(model)
    logp, logq = (torch.log_softmax(head.logits(rows).float(), -1) for rows in (seen, other))  # [n, v]
    return float(torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="batchmean"))


def _blank(image: Any) -> Any:
    Image, _ = pillow()
    return Image.new("RGB", image.size, (255, 255, 255))


def _shuffled(image: Any) -> Any:
    Image, _ = pillow()
    pixels = np.asarray(image).reshape(-1, 3)
    return Image.fromarray(np.random.default_rng(0).permutation(pixels).reshape(image.height, image.width, 3))
