"""A batch taken apart into prompts and completions, and put together again with other completions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selectkd.data.collate import Batch, collate
from selectkd.data.example import Example
from selectkd.data.vision import Images
from selectkd.errors import DataError


@dataclass(frozen=True)
class Rollout:
    """A prompt and its completion; stream: the stream it belongs to; route: the teacher its record names; images: what
    the prompt shows.
    """

    prompt: list[int]
    completion: list[int]
    stream: int
    route: int = -1
    images: Images | None = None

    @property
    def example(self) -> Example:
        """The sample with its answer trained."""
        trained = [False] * len(self.prompt) + [True] * len(self.completion)
        ids, route = [*self.prompt, *self.completion], self.route
        return Example(ids, trained, self.stream, route=route, images=self.images)


def last_turns(batch: Batch) -> list[Rollout]:
    """Each sample of a batch as (everything before its last trained run of tokens, that run); what follows it is cut.

    A conversation of several trained turns is so continued at its last one, its earlier turns being part of the prompt.
    """
    found = []
    for example in examples_of(batch):
        ids, mask = example.input_ids, example.completion
        stop = len(mask) - mask[::-1].index(True) if True in mask else len(mask)
        start = stop
        while start > 0 and mask[start - 1]:
            start -= 1
        images = None if example.images is None else replace(example.images, prefix=start)
        found.append(Rollout(ids[:start], ids[start:stop], example.stream, example.route, images))
    return found


def rebuilt(batch: Batch, samples: Sequence[Example], *, pad_id: int) -> Batch:
    """A padded batch of ``samples`` with their images, or with the other model inputs of ``batch``.

    DataError where the batch has other inputs and ``samples`` are more or fewer than its own.
    """
    collated = collate(list(samples), pad_id=pad_id)
    if batch.images or collated.images:  # a text from a buffer may show images that the batch has not
        return collated.to(batch.input_ids.device)
    if batch.extra and len(samples) != batch.stream.shape[0]:
        raise DataError(
            f"the batch has {batch.stream.shape[0]} samples with {', '.join(batch.extra)}, and the policy makes "
            f"{len(samples)} of them. Use a policy that writes one text a prompt."
        )
    return replace(collated, extra=batch.extra).to(batch.input_ids.device)


def examples_of(batch: Batch) -> list[Example]:
    """The samples of a batch as they are."""
    owner, trained = batch.sequence.flatten(), batch.completion.flatten()
    streams = batch.stream.tolist()
    routes = [-1] * len(streams) if batch.route is None else batch.route.tolist()
    seen = batch.images or (None,) * len(streams)
    return [
        Example(ids.tolist(), trained[owner == sample].tolist(), stream, route=route, images=images)
        for sample, (ids, stream, route, images) in enumerate(
            zip(batch.samples(), streams, routes, seen, strict=True)
        )
    ]
