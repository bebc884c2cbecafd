"""Where a record's images may stand: fields under many names, parts of several interfaces, and what nobody reads."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from selectkd.data.detection import left_aside
from selectkd.data.image_parts import COLUMNS
from selectkd.data.images import ImageRules, found
from selectkd.data.render import TextRules
from selectkd.data.sources import dataset_source
from selectkd.data.text_cache import TextCache
from selectkd.errors import DataError
from selectkd.models.load import load_tokenizer, load_vision
from vision import tiny

PNG = tiny.png(tiny.picture(0))
CODED = base64.b64encode(PNG).decode()
ASKS = {"question": "what is it", "answer": "a cat"}


def part(**fields: Any) -> dict[str, Any]:
    """A record whose image is a part of its turn."""
    asked = [{"type": "image", **fields}, {"type": "text", "text": "what is it"}]
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": "a cat"}]}


def says(text: str, **fields: Any) -> dict[str, Any]:
    return {"question": text, "answer": "a cat", **fields}


def turn(content: Any = "what is it", **fields: Any) -> dict[str, Any]:
    """A record whose question has fields of its own."""
    asked = {"role": "user", "content": content, **fields}
    return {"messages": [asked, {"role": "assistant", "content": "a cat"}]}


READ: dict[str, dict[str, Any]] = {
    **{f"the field {name}": {**ASKS, name: "0.png"} for name in COLUMNS},
    "several paths": {**ASKS, "image_paths": ["0.png"]},
    "nulls beside the image": {
        **ASKS, "images": [], "image": {"bytes": None, "path": None}, "img": "0.png", "videos": [], "audio": None,
        "video": {"bytes": None, "path": None},
    },
    "an image and where it comes from": {**ASKS, "image": "0.png", "image_url": "https://host/0.png"},
    "the same image twice": {**ASKS, "images": ["0.png"], "image": "0.png"},
    "base64 in a field": {**ASKS, "image": CODED},
    "bytes in base64": {**ASKS, "image": {"bytes": CODED, "path": None}},
    "Anthropic's base64": part(source={"type": "base64", "media_type": "image/png", "data": CODED}),
    "data and its type": part(data=CODED, mimeType="image/png"),
    "base64 in lines": part(base64="\n".join(CODED[at : at + 76] for at in range(0, len(CODED), 76))),
    "a data URL as base64": part(base64=f"data:image/png;base64,{CODED}"),
    "a part that counts": {**part(index=0, text=None), "images": ["0.png"]},
    "a part with a path under another name": part(image_path="0.png"),
    "a part whose first field is an object of nulls": part(
        image={"bytes": None, "path": None}, image_url={"url": "0.png"}),
    "a part of nulls and a column": {**part(image={"bytes": None, "path": None}), "images": ["0.png"]},
    "the same image as a path and as an object": {
        **ASKS, "images": ["0.png"], "image": {"bytes": None, "path": "0.png"},
    },
    **{f"the field {name} of a turn": turn(**{name: "0.png"}) for name in COLUMNS},
    "Ollama's images": turn(images=[CODED]),
    "a turn's image and nulls": turn(images=["0.png"], video=None, videos=[], audio={"bytes": None, "path": None}),
    "a turn's image at its part": turn([{"type": "image"}, {"type": "text", "text": "what is it"}], image="0.png"),
    "a turn's image at its mark": turn("<image>what is it", image="0.png"),
    "a turn of ShareGPT": {
        "conversations": [{"from": "human", "value": "what is it", "image": "0.png"},
                          {"from": "gpt", "value": "a cat"}],
    },
    "a pair of input and output": {"conversations": [{"input": "what is it", "output": "a cat", "image": "0.png"}]},
    "a mark, and a field of another name": says("<image>\nwhat is it", image_path="0.png"),
}  # fmt: skip


@pytest.mark.parametrize("name", READ)
def test_an_image_is_read_from_every_field_that_says_what_it_is(read: Any, name: str) -> None:
    wanted = read(tiny.asks("what is it", "a cat", "0.png")).examples[0]
    (one,) = read(READ[name]).examples
    if "a mark" not in name:
        assert one.input_ids == wanted.input_ids
    assert one.images.spans and len(one.images.refs) == 1
    assert one.images.shown()[0].tobytes() == tiny.picture(0).tobytes()


def test_of_several_fields_the_first_of_the_table_is_read_and_the_others_are_named(read: Any) -> None:
    record = {**ASKS, "image_url": "https://host/0.png", "img": "1.png", "image_path": "0.png"}
    source = read(record)
    assert source.examples[0].images.names[0].endswith("/0.png")
    assert "not part of the text: img, image_url" in source.summary
    assert left_aside({"text": "a", "image_url": "u", "audio": "a.wav", "shot": PNG}, "text") == [
        "image_url", "shot", "audio",
    ]  # fmt: skip


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "images beside another image": ({**ASKS, "images": ["0.png"], "image": "1.png"}, "two fields, images and image"),
    "a URL in a field": ({**ASKS, "image_url": "https://host/a.png"}, "image_urls: true"),
    "Anthropic's URL": (part(source={"type": "url", "url": "https://host/a.png"}), "image_urls: true"),
    "a file of Anthropic's": (part(source={"type": "file", "file_id": "f"}), "source is of type 'file'"),
    "a file of OpenAI's": (part(file_id="file-1"), "a file_id, which only its server"),
    "base64 that is none": (part(data="@@@@"), "no base64"),
    "images out of order": ({**part(index=1), "images": ["0.png"]}, "asks for image 1 where image 0 comes"),
    "a video in a field": ({**ASKS, "video": "a.mp4"}, "the field 'video', and video is not read"),
    "videos": ({**ASKS, "image": "0.png", "videos": ["a.mp4"]}, "the field 'videos'"),
    "a sound": ({**ASKS, "audio_path": "a.wav"}, "the field 'audio_path', and audio is not read"),
    "a mark without an image": (says("<image>\nwhat is it"), "turn 0 has <image> .*no image was read"),
    "a mark within a text": (says("is <image> a cat"), "turn 0 has <image>"),
    "a mark and a field of an unknown name": (
        says("<image>what is it", picture=f"data:image/png;base64,{CODED}"), "The field 'picture' holds one"),
    "a field of an unknown name": ({**ASKS, "picture": [f"data:image/png;base64,{CODED}"]}, "'picture' holds an image"),
    "bare base64 in a field of an unknown name": ({**ASKS, "picture_data": CODED}, "'picture_data' holds an image"),
    "a path in an object": ({**ASKS, "picture": {"bytes": None, "path": "a.png"}}, "'picture' holds an image"),
    "imagefolder's metadata": ({**ASKS, "file_name": "a/0.JPG"}, "'file_name' holds an image"),
    "paths in a field of an unknown name": ({**ASKS, "shots": ["0.png"]}, "'shots' holds an image"),
    "an address in a field of an unknown name": (
        {**ASKS, "page": "https://host/a.webp?size=9"}, "'page' holds an image"),
    "a field of an unknown name in a turn": (turn(picture="0.png"), "'picture' holds an image"),
    "a turn's video": (turn(video="a.mp4"), r"messages\[0\]: has the field 'video', and video is not read"),
    "a video of a pair": (
        {"messages": [{"input": "what", "output": "a cat", "video": "a.mp4"}]}, "the field 'video', and video"),
    "an answer's image": (
        {"messages": [{"role": "user", "content": "draw"}, {"role": "assistant", "content": "so", "image": "0.png"}]},
        r"turn 1 \(assistant\) has an image"),
    "two images of a turn for one mark": (
        turn("<image>what", images=["0.png", "1.png"]), "2 images .* 1 placeholder"),
    "images in a turn and in a column": (
        {**turn(image="0.png"), "images": ["1.png"]}, "1 image in the column images, and 0"),
    "an image in a part of text": (
        turn([{"type": "text", "text": "what", "image": "0.png"}]), "type text .* 'image'"),
    "a mark beside an image in a part": (
        {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"},
                                                   {"type": "text", "text": "what is <image>"}]},
                      {"role": "assistant", "content": "a cat"}]}, "turn 0 has <image>"),
    "a video's mark": (says("<video>\nwhat happens"), "turn 0 has <video> .*leave it out"),
    "a sound's mark": (says("what is said?\n<audio>"), "turn 0 has <audio>"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_would_be_trained_blind_is_refused_and_may_be_skipped(read: Any, name: str) -> None:
    record, words = REFUSED[name]
    fine = part(image="0.png") if "messages" in record else {**ASKS, "image": "0.png"}
    with pytest.raises(DataError, match=rf"(?s)data\.jsonl:2: .*{words}"):
        read(fine, record)
    source = read(fine, record, on_bad_record="skip")
    assert len(source.examples) == 1 and source.counts["bad"] == 1


MARKUP = [
    "how do <video> and <audio> differ",
    "a feed is\n<image>\n<url>a.png</url>\n</image>",
    "a < image > is",
]


@pytest.fixture
def text_only(folder_of: Any, tmp_path: Path) -> Any:
    tokenizer = load_tokenizer(folder_of("internvl"))

    def of(*records: Any, **rules: Any) -> Any:
        path = tiny.written(tmp_path, records)
        return dataset_source(
            {"path": str(path)}, tokenizer, TextRules(400, **rules), cache=TextCache(tmp_path, 1)
        )

    return of


def test_words_that_look_like_marks_are_text(read: Any, text_only: Any) -> None:
    assert len(read(*map(says, MARKUP)).examples) == len(MARKUP)
    words = [
        *MARKUP, "what does the tag <image> do?", "write one for me, like so: <image>", "<video> tags do not play",
        "what is wrong with\n<audio>\n<source src='a.wav'>\nin Safari",
    ]  # fmt: skip
    assert len(text_only(*map(says, words)).examples) == len(words)
    answers = {"question": "which tag shows one?", "answer": "<image>"}
    assert len(text_only(answers).examples) == len(read(answers).examples) == 1


def test_a_model_of_text_refuses_what_it_would_read_blind(text_only: Any) -> None:
    for record, words in (
        ({**ASKS, "image_path": "0.png"}, "has 1 image, and the model sees none"),
        ({**ASKS, "images": ["0.png", "1.png"]}, "has 2 images, and the model sees none"),
        (says("<image>\nwhat is it", picture="0.png"), "turn 0 has <image>"),
        (says("what is it\n<image>"), "turn 0 has <image>"),
        (says("<video>what is it"), "turn 0 has <video>"),
        (
            says("<image> what is it", picture=f"data:image/png;base64,{CODED}"),
            "The field 'picture' holds one",
        ),
        ({**ASKS, "audios": ["a.wav"]}, "'audios', and audio is not read"),
    ):
        with pytest.raises(DataError, match=rf"data\.jsonl:1: .*{words}"):
            text_only(record)


def test_a_model_of_text_refuses_the_images_of_turns_and_names_what_may_be_one(text_only: Any) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: has 1 image, and the model sees none"):
        text_only(turn(images=["0.png"]))
    with pytest.raises(DataError, match="the field 'video', and video is not read"):
        text_only(turn(video="a.mp4"))
    source = text_only({**ASKS, "file_name": "0.png", "picture_data": CODED})
    assert len(source.examples) == 1 and "not part of the text: file_name, picture_data" in source.summary


def test_names_of_files_that_are_the_text_are_no_images(read: Any) -> None:
    for record in (
        says("favicon.png", system="a.png"),
        {"question": "which file?", "answer": "logo.png"},
        turn("a.png", name="b.png"),
    ):
        assert len(read(record).examples) == 1


def test_images_of_turns_stand_in_their_turns(read: Any) -> None:
    talk = [turn("this and\n<image>?", images=["1.png"]), turn("or this", image="2.png")]
    (one,) = read({"messages": [each for record in talk for each in record["messages"]]}).examples
    assert [name.rpartition("/")[2] for name in one.images.names] == ["1.png", "2.png"]
    assert len(one.images.places) == 2


def test_texts_that_are_no_pairs_are_no_conversation(text_only: Any) -> None:
    source = text_only({"text": "The news of today.", "texts": ["The news", "of today."]})
    assert source.format == "text" and "not part of the text: texts" in source.summary


def test_plain_text_beside_an_address_of_an_image_is_text(text_only: Any) -> None:
    source = text_only({"text": "The news of today.", "image_url": "https://host/a.png"})
    assert len(source.examples) == 1 and "not part of the text: image_url" in source.summary
    with pytest.raises(DataError, match="images beside text"):
        text_only({"text": "<image>\nA cat on a mat.", "image_path": "0.png"})
    with pytest.raises(DataError, match="images beside text"):
        text_only({"text": "<image>\nA cat on a mat.", "picture": f"data:image/png;base64,{CODED}"})


def test_images_in_memory_are_known_by_their_pixels(folder_of: Any, tmp_path: Path) -> None:
    folder = folder_of("internvl")
    tokenizer, vision = load_tokenizer(folder), load_vision(folder)

    def texts(seed: int) -> int:
        """Tokenises a record with an image in memory; how many texts the cache then has."""
        data = [{**ASKS, "image": tiny.picture(seed)}]
        cache = TextCache(tmp_path, 1)
        dataset_source({"path": "memory"}, tokenizer, TextRules(400), data=data, vision=vision, cache=cache)
        return len(list(tmp_path.iterdir()))

    assert [texts(0), texts(0), texts(1), texts(0)] == [1, 1, 2, 2]


def test_a_file_url_is_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "a b%.png").write_bytes(PNG)
    rules = ImageRules(tmp_path)
    for url in (f"file://{tmp_path}/a%20b%25.png", f"file://localhost{tmp_path}/a%20b%25.png"):
        assert found(url, rules, "x").content() == PNG
    assert found("a b%.png", rules, "x").content() == PNG
    with pytest.raises(DataError, match="outside"):
        found("file:///a/%2e%2e/b.png", rules, "x")
