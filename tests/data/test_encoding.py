"""Texts that are cut into words have the tokens and places of whole ones; records together those of records alone."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from selectkd.data.encoding import Encoder
from selectkd.data.render import TextRules
from selectkd.data.rendering import Rendering
from selectkd.data.template import ChatTemplate
from selectkd.errors import DataError

LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GREEDY = r"[a-zA-Z ]+|."
"""Words with the spaces between them: what no word of ours may be cut from."""


def by(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
TEXTS = [
    "the quick brown fox isn't 12 years old, jumps   over\n\nthe lazy dog",
    "don't stop: été, naïve 漢字 <a b>",
]


def tokenizer_of(before, normalizer=None, *, added=(), model=None):
    bpe = Tokenizer(model or models.BPE())
    bpe.pre_tokenizer = before
    if normalizer is not None:
        bpe.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|end|>", "<|start|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    if model is None:
        bpe.train_from_iterator(TEXTS * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.add_tokens(list(added))
    return tokenizer


KINDS = {
    "gpt2": tokenizer_of(
        BYTES, added=[AddedToken("<th>", normalized=True), AddedToken("end|><", normalized=True)]
    ),
    "llama3": tokenizer_of(by(LLAMA)),
    "digits": tokenizer_of(DIGITS, normalizers.NFC()),
}


@pytest.fixture(scope="module", params=KINDS)
def encoder(request):
    found = Encoder(KINDS[request.param])
    assert found.apart
    return found


PART = st.sampled_from(
    ["<|end|>", "<|start|>", " ", "  ", "\n", " a", "the", " fox", "'s", "1", ".", "é", "漢", " \n "]
)


@given(st.lists(st.one_of(PART, st.text(max_size=3)), max_size=12).map("".join))
@example("the fox <|end|> the  <|start|>\n fox  ")
@example("")
@example("<|end|><th> end|>< ")
def test_a_text_cut_into_words_has_the_tokens_and_places_of_a_whole_one(encoder, text):
    text = text.encode("utf-8", "ignore").decode()
    (whole,), (cut, _) = encoder([text]), encoder([text, "the fox"])
    assert cut.ids == whole.ids
    for place in range(len(text) + 1):
        assert (cut.first(place), cut.crosses(place)) == (whole.first(place), whole.crosses(place))


@pytest.mark.parametrize(
    "tokenizer",
    [
        tokenizer_of(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        tokenizer_of(pre_tokenizers.Metaspace()),
        tokenizer_of(by(GREEDY)),
        tokenizer_of(BYTES, normalizers.Prepend("x")),
        tokenizer_of(BYTES, added=[AddedToken("fox", single_word=True, normalized=False)]),
        tokenizer_of(BYTES, added=[AddedToken("<|strip|>", rstrip=True, normalized=False)]),
        tokenizer_of(
            pre_tokenizers.Whitespace(), model=models.WordLevel({"a": 0, "<|end|>": 1}, unk_token="a")
        ),
    ],
    ids=["prefix", "metaspace", "greedy", "normalizer", "single word", "strip", "word level"],
)
def test_a_tokenizer_that_may_look_beyond_a_word_is_given_whole_texts(tokenizer):
    assert Encoder(tokenizer).apart is None


def test_words_are_forgotten_in_time_and_stay_at_home(encoder, monkeypatch):
    monkeypatch.setattr("selectkd.data.encoding.MOST", 1000)
    encoder(["a" * 1001, "b"])
    before = encoder(["the fox", "b"])
    assert encoder._words.size < 1000
    sent = pickle.loads(pickle.dumps(encoder))
    assert not sent._words.size and sent(["the fox", "b"])[0].ids == before[0].ids


LOOPS = (
    "{% if 'loop' in messages[0]['content'] %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}{% endif %}"
)


def test_records_together_are_those_alone_and_a_bad_one_among_them_is_named(make_tokenizer):
    def row(text):
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "the fox"}]}

    tokenizer = make_tokenizer()
    how = Rendering(tokenizer, ChatTemplate.of(tokenizer), TextRules(64))
    records = [
        (f"d.jsonl:{n}", row(text)) for n, text in enumerate(["a", "b \udcff", "the dog", "i", "c \ufdd2"])
    ]
    found = how.examples(records, "messages")
    assert [isinstance(one, DataError) for one in found] == [False, True, False, False, True]
    assert "d.jsonl:1" in str(found[1]) and "d.jsonl:4" in str(found[4])
    for one, record in zip(found, records, strict=True):
        (alone,) = how.examples([record], "messages")
        assert str(one) == str(alone)
    assert [isinstance(one, DataError) for one in how.examples(records, "messages", until_error=True)] == [
        False,
        True,
    ]


def test_half_a_character_in_what_a_template_writes_of_tools_is_named(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson }}" + tokenizer.chat_template
    how = Rendering(tokenizer, ChatTemplate.of(tokenizer), TextRules(200))
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é"}]
    records = [
        (f"d.jsonl:{number}", {"messages": talk, "tools": [{"type": "function", "function": {"name": name}}]})
        for number, name in enumerate(("é", "\ud800", "b"))
    ]
    found = how.examples(records, "messages")
    assert [isinstance(one, DataError) for one in found] == [False, True, False]
    assert "d.jsonl:1: the rendered conversation: a lone surrogate U+D800" in str(found[1])


def test_a_record_that_ends_the_template_process_takes_no_other_with_it(make_tokenizer, monkeypatch):
    monkeypatch.setattr("selectkd.data.renderer.SECONDS", 0.2)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = LOOPS + tokenizer.chat_template
    how = Rendering(tokenizer, ChatTemplate.of(tokenizer), TextRules(64))
    texts = ["a", "loop", "the dog"]
    records = [(f"d.jsonl:{n}", {"prompt": text, "completion": "the fox"}) for n, text in enumerate(texts)]
    found = how.examples(records, "prompt_completion")
    assert [isinstance(one, DataError) for one in found] == [False, True, False]
    assert "d.jsonl:1: the chat template was still rendering" in str(found[1])
