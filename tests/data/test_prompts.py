"""Prompts that are the same or reworded, found by hashes."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest

from selectkd.data.example import Example
from selectkd.data.examples import Examples
from selectkd.data.formats import to_sample
from selectkd.data.inspect import check, languages
from selectkd.data.prompts import BANDS, ROWS, SHINGLE, groups, packed, prompt_keys, prompt_of, unpacked
from selectkd.data.render import TextRules, render
from selectkd.errors import ConfigError


def near(one, other):
    return any(a == b for a, b in zip(prompt_keys(one), prompt_keys(other), strict=True))


def test_case_punctuation_and_the_form_of_letters_do_not_part_a_prompt():
    for other in ("where is oslo", "Where is OSLO?!", " where   is\n\uff2fslo? "):
        assert prompt_keys("Where is Oslo?") == prompt_keys(other)
    assert not near("Where is Oslo?", "Where is Rome?") and not near("2 + 3", "2 + 4")
    assert len({prompt_keys(text) for text in ("", "?", "a", "b", "\ud800")}) == 5


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("2 + 3", "2 - 3"),
        ("2*3", "2/3"),
        ("What is 2.5 plus 1?", "What is 2 5 plus 1?"),
        ("Is x < y, or is it not?", "Is x > y, or is it not?"),
        ("x^2 = 4", "x 2 = 4"),
        ("Give 5% of 20", "Give 5 of 20"),
        ("2 \u2212 3", "2 \u00d7 3"),
    ],
)
def test_signs_of_calculation_part_prompts_and_keep_them_near(one, other):
    assert prompt_keys(one)[0] != prompt_keys(other)[0]
    assert prompt_keys(one) == prompt_keys(one.replace(" ", "  ") + "!")
    assert near(one, other) == (len(re.findall(r"\w+", one)) >= SHINGLE)


def test_the_space_around_a_sign_and_a_hyphen_between_letters_do_not_part_a_prompt():
    assert prompt_keys("2+3=?") == prompt_keys("2 + 3 = ?")
    assert prompt_keys("A well-known town.") == prompt_keys("a well known town")


@pytest.mark.parametrize("changed", [1, 2, 4])
def test_near_prompts_are_found_as_often_as_theory_says(changed):
    """Words at the end of 40 are changed, 1000 times: s of the shingles are shared, 1 - (1 - s^rows)^bands found."""
    draw = random.Random(changed)
    found = 0
    for trial in range(1000):
        words = [f"w{trial}x{draw.getrandbits(40)}" for _ in range(40)]
        found += near(" ".join(words), " ".join([*words[:-changed], *["other"] * changed]))
    shared = (38 - changed) / (38 + min(changed, 3))  # "other other other" counts once
    expected = 1 - (1 - shared**ROWS) ** BANDS
    assert abs(found / 1000 - expected) < 4 * (expected * (1 - expected) / 1000) ** 0.5


def test_groups_reach_over_prompts_in_between():
    keys = np.array([[1, 2], [3, 2], [3, 4], [5, 6]])
    assert groups(keys).tolist() == [0, 0, 0, 1] and len(groups(keys[:0])) == 0
    assert (unpacked(np.frombuffer(packed(range(9)), np.uint8)[None]) == np.arange(9)).all()


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}, "q"),
        ({"prompt": "q", "completion": "a"}, "q"),
        ({"text": "q a"}, "q a"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "5"),
    ],
)
def test_the_prompt_of_a_record_is_what_asks(row, prompt):
    format = {"messages": "messages", "prompt": "prompt_completion", "text": "text"}.get(
        next(iter(row)), "tokens"
    )
    assert prompt_of(to_sample(row, format)) == prompt


def test_overlap_is_counted_by_tokens_by_prompt_and_by_nearly_the_prompt(tokenizer):
    prompts = [" ".join(f"w{n}x{i}" for i in range(12)) for n in range(4)]
    rows = [(prompts[0], "a"), (prompts[0], "a"), (prompts[1].upper(), "b"), (f"{prompts[2]} so", "c")]

    def rendered(some):
        samples = [
            to_sample({"prompt": asked, "completion": answer}, "prompt_completion", origin=f"f:{line}")
            for line, (asked, answer) in enumerate(some)
        ]
        return [render(sample, tokenizer, TextRules(512))[0] for sample in samples]

    data, held = rendered([*rows, (prompts[3], "d")]), rendered([(text, "a") for text in prompts[:3]])
    found = check(data, held_out=held)
    assert (found.duplicates, found.near_duplicates) == (1, 1)
    assert (found.overlap, found.same_prompt, found.near_prompt) == (2, 3, 4)
    assert any(
        "4 of 5 training examples have a prompt that is held out too or nearly so (3 the same prompt, 2 the same answer"
        in one
        for one in found.warnings
    )
    assert not check(data[-1:], held_out=held).warnings


def test_languages_are_counted_where_the_package_is_there(tokenizer, monkeypatch):
    text = {"en": "The weather in the north is colder than in the south of the country.",
            "de": "Das Wetter im Norden ist k\u00e4lter als im S\u00fcden des Landes, sagt man."}  # fmt: skip
    examples = [
        Example(ids := tokenizer(text[name])["input_ids"], [True] * len(ids)) for name in ("en", "en", "de")
    ]
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "py3langid", None)
        with pytest.raises(ConfigError, match="Languages need py3langid: pip install"):
            languages(examples, tokenizer)
    pytest.importorskip("py3langid")
    assert languages(examples, tokenizer) == {"en": 2, "de": 1}


def test_the_keys_of_prompts_come_out_of_views_as_they_went_in():
    data = [
        Example([1, 2], [False, True], stream, f"f:{n // 2}", prompt=packed(prompt_keys(f"What is {n}?")))
        for n, stream in enumerate((0, 1, 0, 1, 1))
    ]
    text = Examples.of(data)
    for view, rows in (
        (text, data),
        (text[1:4], data[1:4]),
        (Examples.joined([text[3:], text[:2]]), data[3:] + data[:2]),
    ):
        assert view.prompts.tolist() == [
            list(unpacked(np.frombuffer(one.prompt, np.uint8))[0]) for one in rows
        ]
        assert view.records == len({one.origin for one in rows})
    assert Examples.of([]).prompts.shape == (0, 1 + BANDS) and Examples.of([]).records == 0
