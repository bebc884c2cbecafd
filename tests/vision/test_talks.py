"""Conversations with images in several turns: what goes where they are too long, and their side of a split."""

from __future__ import annotations

import json
from typing import Any

import pytest

from selectkd.data.prompts import split
from selectkd.data.sources import Source
from selectkd.data.template import ChatTemplate
from selectkd.errors import DataError
from selectkd.models.load import load_tokenizer
from vision import tiny

THINKS = ChatTemplate(
    tiny.TEMPLATE.replace("IMAGE", "<IMG_CONTEXT>").replace(
        "{% if m['content'] is string %}",
        "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
        "{% if m['content'] is string %}",
    )
)
"""A template that takes reasoning out of earlier turns."""
SYSTEM = {"role": "system", "content": "You are terse."}


def asked(text: str, *paths: str) -> dict[str, Any]:
    parts = [{"type": "image", "image": path} for path in paths]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def says(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def talk(*turns: dict[str, Any]) -> dict[str, Any]:
    return {"messages": list(turns)}


LONG = talk(
    SYSTEM, asked("what is it", "0.png"), says("a cat"), asked("and these", "1.png", "2.png"), says("two dogs"),
    {"role": "user", "content": "sure"}, says("yes"), asked("the last", "3.png"), says("a sofa"),
)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(folder_of: Any) -> Any:
    return load_tokenizer(folder_of("internvl"))


def shown(source: Source, tokenizer: Any) -> list[tuple[str, list[str]]]:
    """The text of each sample, and the names of the images it shows."""
    found = []
    for one in source.examples:
        names = [] if one.images is None else [name.rpartition("/")[2] for name in one.images.names]
        found.append((tokenizer.decode(one.input_ids).replace("<IMG_CONTEXT>", ""), names))
    return found


def test_a_long_talk_loses_whole_turns_with_their_images_and_keeps_its_system_prompt(
    read: Any, tokenizer: Any
) -> None:
    whole = read(LONG, train_turns="last").examples[0]
    least = read(talk(SYSTEM, *LONG["messages"][-2:])).examples[0].completion.index(True)
    seen = set()
    for most in range(least, whole.completion.index(True) + 1):
        source = read(LONG, train_turns="last", max_prompt_length=most)
        assert len(source.examples) == 1
        for text, names in shown(source, tokenizer):
            assert text.startswith("<|system|>You are terse.<|end|><|user|>") and text.endswith(
                "a sofa<|end|>"
            )
            assert names in (["0.png", "1.png", "2.png", "3.png"], ["1.png", "2.png", "3.png"], ["3.png"])
            assert text.count("<img>") == len(names)
            assert ("sure" in text) == (len(names) > 1 or "<|user|>sure" in text)
            seen.add((len(names), "sure" in text))
            example = source.examples[0]
            assert example.completion.index(True) <= most and len(example.images.places) == len(names)
            assert example.cut_prompt == (len(names) < 4)
    assert seen == {(4, True), (3, True), (1, True), (1, False)}


def test_no_more_turns_go_than_must(read: Any, tokenizer: Any) -> None:
    """Images are counted by their tokens: each limit keeps what a talk of these turns alone would be."""
    for kept in ((3, 4, 5, 6, 7, 8), (5, 6, 7, 8), (7, 8)):
        less = read(
            talk(SYSTEM, *(LONG["messages"][number] for number in kept)), train_turns="last"
        ).examples[0]
        source = read(LONG, train_turns="last", max_prompt_length=less.completion.index(True))
        assert source.examples[0].input_ids == less.input_ids
        assert source.examples[0].images.spans == less.images.spans
        assert source.examples[0].images.key == less.images.key


def test_a_talk_that_would_lose_an_image_or_its_system_prompt_is_dropped_and_counted(read: Any) -> None:
    fine = talk(asked("?", "3.png"), says("a"))
    for turns in ((SYSTEM, asked("a long question " * 9, "3.png"), says("a")),
                  (asked("a long question " * 9, "3.png"), says("a")),
                  ({"role": "user", "content": [*asked("a long question " * 9)["content"],
                                                {"type": "image", "image": "3.png"}]}, says("a"))):  # fmt: skip
        source = read(fine, talk(*turns), max_prompt_length=60)
        assert len(source.examples) == 1
        assert source.counts["prompt longer than max_prompt_length"] == 1


def test_all_samples_of_a_record_are_on_one_side_of_a_split(read: Any) -> None:
    """A sample of each answer, with other images each."""
    rows = [
        talk(asked("what is it", path), says("a", reasoning_content="so"), asked("and this", "2.png"), says(f"b{n}"))
        for n, path in enumerate(("0.png", "1.png", "3.png", "0.png"))
    ]  # fmt: skip
    source = read(*rows, template=THINKS)
    origins = [one.origin for one in source.examples]
    assert len(origins) == 8 and len({(one.origin, one.images.key) for one in source.examples}) == 8
    sides = {one.origin: set() for one in source.examples}
    for one in source.examples:
        sides[one.origin].add(one.prompt)
    assert all(len(keys) == 1 for keys in sides.values())
    prompts = [next(iter(keys)) for keys in sides.values()]
    assert prompts[0] == prompts[3] and len(set(prompts)) == 3  # the same question about the same image


def test_reworded_questions_about_one_image_are_on_one_side(read: Any) -> None:
    question = (
        "please tell me in a word or two what it is that stands in the very middle of the picture over there"
    )
    rows = [tiny.asks(text, "a cat", path) for path in ("0.png", "3.png")
            for text in (question, question.replace("please", "kindly"))]  # fmt: skip
    keys = read(*rows).examples.prompts
    shared = [[bool(set(one.tolist()) & set(other.tolist())) for other in keys] for one in keys]
    assert shared == [[True, True, False, False]] * 2 + [[False, False, True, True]] * 2
    (held_out,) = split([keys], 0.5).held_out
    assert sorted(held_out.tolist()) == [False, False, True, True] and held_out[0] == held_out[1]


def test_a_question_behind_the_last_answer_is_not_read(read: Any, tokenizer: Any) -> None:
    answer = (asked("what is it", "0.png"), says("a cat"))
    alone = read(talk(*answer)).examples[0]
    for more in ((asked("and this", "missing.png"),), (asked("and this", "1.png"), says("a dog", weight=0)),
                 (asked("and this", "1.png"), says(""))):  # fmt: skip
        (one,) = read(talk(*answer, *more)).examples
        assert one.input_ids == alone.input_ids and one.images.key == alone.images.key


def test_an_answer_between_others_that_is_not_trained_keeps_its_images(read: Any) -> None:
    turns = (asked("what is it", "0.png"), says("a cat", weight=0), asked("and this", "1.png"), says("a dog"))
    (one,) = read(talk(*turns)).examples
    assert [name.rpartition("/")[2] for name in one.images.names] == ["0.png", "1.png"]
    assert json.dumps(one.completion).count("true") == len("a dog") + 1


def test_the_placeholder_in_a_text_before_the_last_answer_is_refused(read: Any) -> None:
    turns = (
        asked("what is <IMG_CONTEXT>", "0.png"),
        says("a cat"),
        asked("and this", "1.png"),
        says("a dog"),
    )
    with pytest.raises(DataError, match="image placeholders"):
        read(talk(*turns))


def test_an_answer_that_would_lose_all_its_images_is_dropped_and_counted(read: Any) -> None:
    turns = (
        asked("what is it", "0.png"),
        says("a cat on a mat " * 4),
        asked("what colour is it"),
        says("red"),
    )
    source = read(
        talk(asked("?", "3.png"), says("a")), talk(*turns), train_turns="last", max_prompt_length=60
    )
    assert len(source.examples) == 1 and source.counts["its images would be cut"] == 1
    kept = talk(asked("hello " * 9), says("yes"), *turns[:1], says("a cat"), *turns[2:])
    limit = read(talk(*kept["messages"][2:]), train_turns="last").examples[0].completion.index(True)
    (one,) = read(kept, train_turns="last", max_prompt_length=limit).examples
    assert one.cut_prompt and len(one.images.refs) == 1
    words = talk(asked("hello " * 9), says("yes"), asked("what colour is it"), says("red"))
    (one,) = read(words, train_turns="last", max_prompt_length=40).examples
    assert one.cut_prompt and not one.images.refs
