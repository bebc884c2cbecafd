"""Kinds of files of images: grey of sixteen bits, base64 without a header, long thin images, words of refusals."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selectkd.data.images import ImageRules, decoded, found
from selectkd.errors import DataError
from vision import tiny

DEEP = np.linspace(0, 65_535, 480).astype(np.uint16).reshape(20, 24)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


GREY = {
    "PNG": saved(Image.fromarray(DEEP), "PNG"),
    "TIFF": saved(Image.fromarray(DEEP), "TIFF"),
    "TIFF, high byte first": saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"),
    "PGM": b"P5\n24 20\n65535\n" + DEEP.astype(">u2").tobytes(),
    "PGM of ten bits": b"P5\n24 20\n1023\n" + (DEEP >> 6).astype(">u2").tobytes(),
}


@pytest.mark.parametrize("name", GREY)
def test_sixteen_bits_of_grey_are_read_as_the_eight_highest(name: str) -> None:
    found = np.asarray(decoded(GREY[name], "x")).astype(int)
    assert found.shape == (20, 24, 3)
    assert np.abs(found - (DEEP >> 8)[..., None]).max() <= (1 if "ten" in name else 0)


def test_of_sixteen_bits_of_grey_only_the_transparent_one_is_white() -> None:
    found = np.asarray(decoded(saved(Image.fromarray(DEEP), "PNG", transparency=int(DEEP[3, 5])), "x"))
    wanted = np.repeat((DEEP >> 8).astype(np.uint8)[..., None], 3, axis=2)
    wanted[3, 5] = 255
    assert (found == wanted).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_file_in_base64_without_a_header_is_an_image(kind: str) -> None:
    content = tiny.png(tiny.picture(0), kind)
    assert found(base64.b64encode(content).decode(), ImageRules(), "x").content() == content


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000), (500, 3)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_long_thin_image_has_no_more_pixels_than_allowed(size: tuple[int, int], kind: str) -> None:
    width, height = decoded(tiny.png(Image.new("RGB", size), kind), "x", max_pixels=400).size
    assert 0 < width * height <= 400


def test_refusals_of_images_say_one_thing_in_plain_words() -> None:
    two = saved(tiny.picture(0), "TIFF", save_all=True, append_images=[tiny.picture(1)])
    with pytest.raises(DataError) as frames:
        decoded(two, "d:1")
    assert str(frames.value) == "d:1: the TIFF has 2 frames; an image has one."
    with pytest.raises(DataError, match="first bytes are those of no kind") as none:
        decoded(b"an image, surely", "d:1")
    assert "object" not in str(none.value)
