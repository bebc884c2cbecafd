"""Images and records that are broken, hostile or unusual: a clear error, or the right result in bounded memory."""

from __future__ import annotations

import base64
import http.server
import io
import resource
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from selectkd.data.images import MOST_BYTES, ImageRef, ImageRules, decoded, found
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.text_cache import TextCache
from selectkd.errors import DataError, IntegrityError, SelectKDError
from selectkd.models.load import load_tokenizer, load_vision
from vision import tiny

GREY = Image.new("RGB", (8, 6), (90, 90, 90))


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def empty_png(width: int, height: int) -> bytes:
    """A PNG whose header promises so many pixels, a few bytes of which are there."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def animated(kind: str) -> bytes:
    stream = io.BytesIO()
    GREY.save(stream, kind, save_all=True, append_images=[Image.new("RGB", (8, 6), (9, 200, 9))])
    return stream.getvalue()


REFUSED: dict[str, tuple[bytes, str]] = {
    "no bytes": (b"", "not a sound image"),
    "text": (b"an image, surely", "not a sound image"),
    "half a JPEG": (tiny.png(tiny.picture(0, 64, 64), "JPEG")[:600], "not a sound image"),
    "half a PNG": (tiny.png(tiny.picture(0, 64, 64))[:400], "not a sound image"),
    "a PNG with a wrong checksum": (tiny.png(GREY).replace(b"IDAT", b"IDAX", 1), "not a sound image"),
    "20,000 x 20,000": (empty_png(20_000, 20_000), "20,000 x 20,000 pixels|more than 67"),
    "100,000 x 1,000": (empty_png(100_000, 1_000), "100,000 x 1,000 pixels"),
    "rows that end early": (empty_png(2_000, 2_000), "not a sound image"),
    "an animated GIF": (animated("GIF"), "2 frames"),
    "an animated WebP": (animated("WEBP"), "2 frames"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n", "not a sound image"),
    "numbers of 32 bits": (tiny.png(Image.new("F", (4, 4)), "TIFF"), "32 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bytes_that_are_no_sound_still_image_are_refused(name: str) -> None:
    content, words = REFUSED[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=f"^data.jsonl:7: .*({words})"):
        decoded(content, "data.jsonl:7")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # KiB: what is promised is not allocated


def test_unusual_images_are_read_as_they_look() -> None:
    red, half = Image.new("RGB", (8, 6), (250, 10, 10)), Image.new("RGBA", (8, 6), (0, 0, 0, 0))
    cmyk = decoded(tiny.png(red.convert("CMYK"), "JPEG"), "x")
    assert cmyk.mode == "RGB" and np.abs(np.asarray(cmyk, int) - np.asarray(red, int)).max() < 12
    assert np.asarray(decoded(tiny.png(half), "x")).min() == 255  # what is transparent is white
    pure = Image.new("RGB", (8, 6), (255, 0, 0))
    assert (np.asarray(decoded(tiny.png(pure.convert("P")), "x")) == np.asarray(pure)).all()
    deep = Image.fromarray(np.full((4, 4), 32_768, np.uint16))
    assert np.asarray(decoded(tiny.png(deep), "x")).tolist() == np.full((4, 4, 3), 128).tolist()
    assert decoded(tiny.png(Image.new("1", (1, 1))), "x").size == (1, 1)
    assert decoded(tiny.png(GREY, "GIF"), "x").mode == "RGB"


def test_a_photograph_taken_sideways_stands_upright() -> None:
    wide = tiny.picture(3, 40, 20)
    rotated = Image.Exif()
    rotated[274] = 6
    stream = io.BytesIO()
    wide.save(stream, "PNG", exif=rotated)
    upright = decoded(stream.getvalue(), "x")
    assert upright.size == (20, 40)
    assert (np.asarray(upright) == np.asarray(wide.transpose(Image.Transpose.ROTATE_270))).all()


def test_an_image_is_scaled_down_to_what_its_source_allows() -> None:
    large = tiny.png(tiny.picture(0, 800, 400), "JPEG")
    assert decoded(large, "x", max_pixels=5000).size == (100, 50)
    assert decoded(large, "x", max_pixels=10**6).size == (800, 400)


def test_paths_do_not_leave_the_folder(tmp_path: Path) -> None:
    inside, outside = tmp_path / "data", tmp_path / "secret.png"
    inside.mkdir()
    GREY.save(outside)
    (inside / "link.png").symlink_to(outside)
    GREY.save(inside / "fine.png")
    rules = ImageRules(inside)
    for path in ("../secret.png", str(outside), "link.png", "a/../../secret.png", f"file://{outside}"):
        with pytest.raises(DataError, match="outside"):
            found(path, rules, "d:1")
    for path in ("missing.png", ".", "a\0b.png", ""):
        with pytest.raises(DataError, match="d:1"):
            found(path, rules, "d:1")
    assert found("fine.png", rules, "d:1").image().size == (8, 6)
    assert found(str(inside / "fine.png"), rules, "d:1").by_path


def test_bytes_data_urls_and_images_in_memory_are_one_image(tmp_path: Path) -> None:
    rules, content = ImageRules(tmp_path), tiny.png(GREY)
    text = base64.b64encode(content).decode()
    for source in (
        content,
        {"bytes": content, "path": "x.png"},
        f"data:image/png;base64,{text}",
        {"base64": text},
    ):
        assert found(source, rules, "x").content() == content
    assert (np.asarray(found(GREY, rules, "x").image()) == np.asarray(GREY)).all()
    for wrong in ("data:image/png;base64,@@", {"name": 1}, 7, {"base64": "é"}):
        with pytest.raises(DataError, match=r"^x: "):
            found(wrong, rules, "x")
    with pytest.raises(DataError, match="bytes"):
        found(bytes(MOST_BYTES + 1), rules, "x")
    packed = found(content, rules, "x", max_pixels=12).packed()
    assert ImageRef.unpacked(packed).packed() == packed and ImageRef.unpacked(packed).max_pixels == 12


@pytest.fixture
def server() -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302 if "elsewhere" in self.path else 200)
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(tiny.png(GREY))

        def log_message(self, *_: Any) -> None: ...

    running = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}"
    running.shutdown()
    running.server_close()


def test_urls_are_fetched_only_where_that_is_allowed(server: str) -> None:
    with pytest.raises(DataError, match="image_urls: true"):
        found(f"{server}/a.png", ImageRules(), "x")
    allowed = ImageRules(urls=True)
    assert found({"url": f"{server}/a.png"}, allowed, "x").image().size == (8, 6)
    for url in (
        f"{server}/elsewhere.png",
        "http://127.0.0.1:1/a.png",
        "ftp://host/a.png",
        "s3://bucket/a.png",
    ):
        with pytest.raises(DataError, match=r"^x: "):
            found(url, allowed, "x")


ASKED = {"role": "user", "content": "<image>\nwhat is it"}
SAYS = {"role": "assistant", "content": "a cat"}
INLINE = "data:image/png;base64," + base64.b64encode(tiny.png(tiny.picture(0))).decode()
ASKED_INLINE = [{"type": "image_url", "image_url": {"url": INLINE}}, {"type": "text", "text": "what is it"}]
MARKED = "<image>what is it"
TALK = [{"from": "human", "value": MARKED}, {"from": "gpt", "value": "a cat"}]
SHAPES: dict[str, dict[str, Any]] = {
    "a part with a path": tiny.asks("what is it", "a cat", "0.png"),
    "a part of OpenAI's": {"messages": [{"role": "user", "content": ASKED_INLINE}, SAYS]},
    "a mark in the text and a column": {
        "messages": [{**ASKED, "content": MARKED}, SAYS],
        "images": ["0.png"],
    },
    "LLaVA's": {"conversations": TALK, "image": "0.png"},
    "the Cauldron's": {
        "images": ["0.png"],
        "texts": [{"user": "what is it", "assistant": "a cat", "source": "x"}],
    },
    "a column alone": {"question": "what is it", "answer": "a cat", "image": "0.png"},
    "an instruction": {"instruction": "what is it", "output": "a cat", "images": ["0.png"]},
}


def test_every_shape_of_a_record_gives_one_sample(read: Any) -> None:
    samples = [read(record).examples[0] for record in SHAPES.values()]
    for name, sample in zip(SHAPES, samples, strict=True):
        assert sample.input_ids == samples[0].input_ids, name
        assert sample.images.spans == samples[0].images.spans, name
        assert sample.images.places and not any(
            any(sample.completion[begin:end]) for begin, end in sample.images.places
        )


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two images for one placeholder": (
        {"messages": [ASKED, SAYS], "images": ["0.png", "1.png"]}, "2 images .* and 1 placeholder "),
    "none for one": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, SAYS]}, "0 images .* 1 placeholder "),
    "one for two": (
        {"messages": [{**ASKED, "content": "<image><image>?"}, SAYS], "image": "0.png"}, "1 image .* 2 placeholders"),
    "a missing file": (tiny.asks("?", "a", "no.png"), r"messages\[0\]\.content\[0\]: no image 'no.png'"),
    "a path outside": (tiny.asks("?", "a", "../../etc/passwd"), "outside"),
    "a URL": (tiny.asks("?", "a", "https://host/a.png"), "image_urls: true"),
    "an image in an answer": (
        {"messages": [ASKED, {"role": "assistant", "content": [{"type": "image", "image": "0.png"}]}]}, "assistant"),
    "the placeholder in the text": (tiny.asks("what is <IMG_CONTEXT>", "a", "0.png"), "2 image placeholders"),
    "the placeholder without an image": (
        {"messages": [{"role": "user", "content": "what is <IMG_CONTEXT>"}, SAYS]}, "1 image placeholders .* 0 images"),
    "a wrong limit": ({**tiny.asks("?", "a", "0.png"), "max_pixels": -3}, "max_pixels is -3"),
    "a video": ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, SAYS]}, "'video'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_records_whose_images_are_wrong_are_refused_with_their_line(read: Any, name: str) -> None:
    record, words = WRONG[name]
    with pytest.raises(DataError, match=rf"(?s)data\.jsonl:2: .*{words}"):
        read(tiny.asks("what is it", "a cat", "0.png"), record)


def test_images_beside_plain_text_are_refused(read: Any) -> None:
    with pytest.raises(DataError, match=r"jsonl:1: images beside text"):
        read({"text": "a text", "image": "0.png"})


def test_bad_records_are_skipped_and_counted_where_the_recipe_says_so(read: Any) -> None:
    wrong = [record for record, _ in WRONG.values()]
    source = read(tiny.asks("what is it", "a cat", "0.png"), *wrong, on_bad_record="skip")
    assert len(source.examples) == 1 and source.counts["bad"] == len(wrong)


def test_no_image_is_ever_cut(read: Any) -> None:
    whole = read(tiny.asks("what is it", "a cat on the mat", "1.png", "2.png")).examples[0]
    end = whole.images.places[-1][1]
    first = whole.completion.index(True)
    for length in range(first + 1, len(whole)):  # the answer is cut, the images stand before it
        kept = read(tiny.asks("what is it", "a cat on the mat", "1.png", "2.png"), length=length).examples[0]
        assert kept.images.spans == whole.images.spans and kept.truncated
        break
    fine, cut = tiny.asks("?", "a", "3.png"), tiny.asks("what is it", "a cat", "1.png", "2.png")
    limits: dict[str, dict[str, int]] = {
        "image would be cut": {"length": end - 1},
        "prompt longer than max_prompt_length": {"length": end + 40, "max_prompt_length": first - 4},
    }
    for reason, limit in limits.items():
        source = read(fine, cut, **limit)
        assert [len(one.images.places) for one in source.examples] == [1]
        assert source.counts[reason] == 1
    with pytest.raises(DataError, match="max_length is"):
        read(fine, cut, length=end - 1, on_too_long="error")


def test_an_image_that_changes_behind_the_cache_is_noticed(read: Any) -> None:
    source = read(tiny.asks("what is it", "a cat", "0.png"))
    example = source.examples[0]
    path = Path(ImageRef.unpacked(example.images.refs[0]).payload.decode())
    example.images.features()
    tiny.picture(9).save(path)
    with pytest.raises(IntegrityError, match=r"0\.png is not the image that was tokenised"):
        source.examples[0].images.features()


def test_an_image_that_changed_is_named_when_its_text_is_opened(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("internvl")
    tokenizer, vision = load_tokenizer(folder), load_vision(folder)
    tiny.data(tmp_path)
    path = tiny.written(tmp_path, [tiny.asks("?", "a", "0.png"), tiny.asks("?", "b", "1.png", "2.png")])

    def opened() -> int:
        cache = TextCache.at(tmp_path / "cache", workers=1)
        source = dataset_source({"path": str(path)}, tokenizer, TextRules(400), vision=vision, cache=cache)
        return len(source.examples)

    assert opened() == opened() == 2
    image = tmp_path / "2.png"
    whole = image.read_bytes()
    image.write_bytes(whole)  # newer, and the same
    assert opened() == 2
    for change in (lambda: tiny.picture(9).save(image), image.unlink):
        change()
        with pytest.raises(IntegrityError, match=r"2\.png is not the image that was tokenised"):
            opened()
    image.write_bytes(whole)
    assert opened() == 2


def test_one_question_about_two_images_is_two_samples(read: Any) -> None:
    records = [tiny.asks("what is it", "a cat", path) for path in ("0.png", "3.png", "0.png")]
    keys = {bytes(key) for key in read(*records).examples.column("key")}
    assert len(keys) == 2
    assert len({one.prompt for one in read(*records).examples}) == 2


def test_a_model_that_sees_nothing_refuses_images(folder_of: Any, tmp_path: Path) -> None:
    tokenizer, path = load_tokenizer(folder_of("internvl")), tiny.data(tmp_path)
    with pytest.raises(SelectKDError, match="the model sees none"):
        dataset_source({"path": str(path)}, tokenizer, TextRules(64), cache=TextCache(tmp_path / "c", 1))
