from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from selectkd.data.alignment import align, template_fingerprint, tokenizer_fingerprint
from selectkd.errors import ConfigError


def changed(tokenizer, change):
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    change(parts)
    backend = Tokenizer.from_str(json.dumps(parts))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")


def test_head_widths_may_differ_over_the_same_ids(make_tokenizer):
    teacher, student = make_tokenizer(), make_tokenizer(eos_token="<|endoftext|>")
    found = align(teacher, student, teacher_width=384, student_width=320)
    assert found.shared_width == len(teacher) and found.teacher_eos == (2,) and found.student_eos == (0,)
    assert found.mask(384).sum() == len(teacher) and not found.mask(384)[len(teacher) :].any()


def test_two_swapped_ids_are_named(tokenizer):
    def swap(parts):
        vocab = parts["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    first = tokenizer.convert_tokens_to_ids("a")
    with pytest.raises(ConfigError, match=rf"2 ids differ(.|\n)*id {first}: teacher 'b', student 'a'"):
        align(changed(tokenizer, swap), tokenizer)


def test_a_token_only_the_teacher_has_is_named(tokenizer, make_tokenizer):
    with pytest.raises(ConfigError, match=r"1 ids differ(.|\n)*'<tool>', student has no such id"):
        align(make_tokenizer(extra=("<tool>",)), tokenizer)


def test_changed_merges_are_named(tokenizer):
    def swap(parts):
        merges = parts["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    with pytest.raises(ConfigError, match=r"other merges(.|\n)*number 0"):
        align(tokenizer, changed(tokenizer, swap))


def test_another_way_of_cutting_text_is_named(tokenizer):
    def lower(parts):
        parts["normalizer"] = {"type": "Lowercase"}

    with pytest.raises(ConfigError, match="cut text differently"):
        align(tokenizer, changed(tokenizer, lower))


def test_another_tokenizer_and_a_head_that_is_too_small_are_refused(tokenizer, make_tokenizer):
    with pytest.raises(ConfigError, match="different tokenizers") as caught:
        align(make_tokenizer(corpus=["zebras xylophone wow " * 3]), tokenizer)
    assert len(str(caught.value).splitlines()) <= 6
    with pytest.raises(ConfigError, match="student's head has 100 rows"):
        align(tokenizer, tokenizer, student_width=100)


def test_the_fingerprint_changes_with_the_ids_and_not_with_the_template(tokenizer, make_tokenizer):
    same = make_tokenizer(None)
    assert tokenizer_fingerprint(same) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(make_tokenizer(extra=("<x>",))) != tokenizer_fingerprint(tokenizer)
    assert template_fingerprint(same) == "" != template_fingerprint(tokenizer)
