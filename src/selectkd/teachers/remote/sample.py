"""A sample as a server is asked about it, and the parts of a text without and with images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import NamedTuple

from selectkd.data.example import Example
from selectkd.data.vision import Images

FIRST = 4096
"""Samples among which those with images are looked for: reading so many takes a tenth of a second."""


class Sample(NamedTuple):
    """Token ids, the places whose rows are wanted, and the images that the sample shows."""

    ids: Sequence[int]
    places: Sequence[int]
    images: Images | None = None


def after_images(example: Example) -> list[int]:
    """The tokens behind an example's last image; all of them without any."""
    ends = () if example.images is None else (end for _, end in example.images.places)
    return example.input_ids[max(ends, default=0) :]


def with_images(examples: Iterable[Example]) -> Iterator[Example]:
    """The examples among the first that show images. Of a model that sees none, no more than the first is read."""
    rest = iter(examples)
    first = next(rest, None)
    if first is None or first.images is None:
        return iter(())
    of_first = islice(chain([first], rest), FIRST)
    return (example for example in of_first if example.images is not None and example.images.refs)
