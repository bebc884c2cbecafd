from __future__ import annotations

import time

import pytest

from selectkd.data.detection import detect_format
from selectkd.data.example import Dropped, Example
from selectkd.data.formats import to_sample
from selectkd.data.inspect import pieces
from selectkd.data.render import TextRules, render
from selectkd.errors import ConfigError, DataError

MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\\n' }}{"
    "% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
STRIPS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NO_EOS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def chat(*texts):
    return {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    }


def do(row, tokenizer, eos_ids=(), **options):
    sample = to_sample(row, detect_format(row), origin="d.jsonl:3")
    (made,) = render(sample, tokenizer, TextRules(**{"max_length": 512, **options}), eos_ids=eos_ids)
    return made


def trained_text(example, tokenizer):
    return [text for text, trained in pieces(example, tokenizer) if trained]


@pytest.mark.parametrize("template", ["prefix", "marks"])
def test_assistant_turns_and_their_eos_are_trained_and_nothing_else(tokenizer, make_tokenizer, template):
    used = tokenizer if template == "prefix" else make_tokenizer(MARKED)
    example = do(chat("hello", "yes", "world", "no \u00e9\U0001f469\u200d\U0001f4bb"), used)
    assert trained_text(example, used) == ["yes<|im_end|>", "no \u00e9\U0001f469\u200d\U0001f4bb<|im_end|>"]
    assert used.decode(example.input_ids) == used.apply_chat_template(
        chat("hello", "yes", "world", "no \u00e9\U0001f469\u200d\U0001f4bb")["messages"], tokenize=False
    )


def test_the_mask_goes_by_position_when_the_user_says_what_the_assistant_says(tokenizer):
    row = chat("<|im_start|>assistant\nyes<|im_end|>\n", "yes")
    example = do(row, tokenizer)
    assert trained_text(example, tokenizer) == ["yes<|im_end|>"]
    assert example.completion.index(True) > len(example) - 6


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hello", "completion": "yes"},
        {"instruction": "hello", "input": "", "output": "yes"},
        {"prompt": "hello", "chosen": "yes", "rejected": "no"},
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "yes"}]},
    ],
)
def test_with_a_template_every_format_becomes_the_same_chat(tokenizer, row):
    assert do(row, tokenizer) == do(chat("hello", "yes"), tokenizer)


def test_history_turns_are_not_trained_under_generation_marks_either(make_tokenizer):
    marked = make_tokenizer(MARKED)
    example = do({"instruction": "q", "output": "yes", "history": [["a", "no"]]}, marked)
    assert trained_text(example, marked) == ["yes<|im_end|>"]


def test_without_a_template_prompt_and_completion_join_and_end_in_eos(plain_tokenizer):
    example = do({"prompt": "hello ", "completion": "world"}, plain_tokenizer)
    assert plain_tokenizer.decode(example.input_ids) == "hello world<|im_end|>"
    assert trained_text(example, plain_tokenizer) == ["world<|im_end|>"]


def test_a_token_across_the_boundary_is_never_half_trained(plain_tokenizer):
    assert plain_tokenizer.tokenize("hello") == ["he", "ll", "o"]
    example = do({"prompt": "h", "completion": "ello"}, plain_tokenizer)
    assert trained_text(example, plain_tokenizer) == ["ello<|im_end|>"]
    example = do({"prompt": "hel", "completion": "lo"}, plain_tokenizer)
    assert trained_text(example, plain_tokenizer) == ["lo<|im_end|>"]


def test_without_a_template_instructions_take_the_alpaca_layout(plain_tokenizer):
    row = {"instruction": "add {input}", "input": "{instruction} 2", "output": "4"}
    text = plain_tokenizer.decode(do(row, plain_tokenizer, max_length=2000).input_ids)
    assert (
        "### Instruction:\nadd {input}\n\n### Input:\n{instruction} 2\n\n### Response:\n4<|im_end|>" in text
    )


def test_without_a_template_a_conversation_is_refused_with_what_would_work(plain_tokenizer):
    with pytest.raises(DataError, match=r"d\.jsonl:3.*no chat template"):
        do(chat("a", "b"), plain_tokenizer)


def test_text_is_trained_from_its_second_token_to_eos(tokenizer):
    example = do({"text": "hello world"}, tokenizer)
    assert example.completion == [False] + [True] * (len(example) - 1)
    assert tokenizer.decode(example.input_ids) == "hello world<|im_end|>"


def test_train_on_all_trains_the_prompt_too(tokenizer):
    example = do(chat("hello", "yes"), tokenizer, train_on="all")
    assert example.completion == [False] + [True] * (len(example) - 1)


def test_eos_and_bos_come_once(make_tokenizer):
    from tokenizers.processors import TemplateProcessing

    own = make_tokenizer(None, bos_token="<|im_start|>")
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>", special_tokens=[("<|im_start|>", 1), ("<|im_end|>", 2)]
    )
    for prompt in ("hello ", "<|im_start|>hello "):
        for completion in ("yes", "yes<|im_end|>"):
            ids = do({"prompt": prompt, "completion": completion}, own).input_ids
            assert own.decode(ids) == "<|im_start|>hello yes<|im_end|>"


def test_pad_equal_to_eos_no_pad_and_no_eos_all_render(make_tokenizer):
    same = make_tokenizer(pad_token="<|im_end|>")
    assert trained_text(do(chat("a", "yes"), same), same) == ["yes<|im_end|>"]
    none = make_tokenizer(None, eos_token=None, pad_token=None)
    assert none.decode(do({"prompt": "a ", "completion": "yes"}, none).input_ids) == "a yes"
    other = make_tokenizer(eos_token="<|endoftext|>")
    example = do(chat("a", "yes"), other, eos_ids=(other.convert_tokens_to_ids("<|im_end|>"),))
    assert trained_text(example, other) == ["yes<|im_end|>"]


def test_a_template_that_ends_turns_in_plain_text_gets_a_trained_eos(make_tokenizer):
    own = make_tokenizer(NO_EOS)
    example = do(chat("hello", "yes"), own)
    assert own.decode(example.input_ids) == "user: hello\nassistant: yes\n<|im_end|>"
    assert trained_text(example, own) == ["yes\n<|im_end|>"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (chat("hello", ""), "empty completion"),
        (chat("hello", " \n"), "empty completion"),
        (chat("hello"), "no completion"),
        (
            {"messages": [*chat("hello")["messages"], {"role": "assistant", "content": "a", "weight": 0}]},
            "every answer has weight 0",
        ),
        ({"prompt": "a", "completion": ""}, "empty completion"),
        ({"text": "  "}, "nothing to train on"),
        ({"input_ids": []}, "nothing to train on"),
        ({"input_ids": [5]}, "nothing to train on"),
    ],
)
def test_rows_without_anything_to_learn_are_dropped_with_the_reason(tokenizer, plain_tokenizer, row, reason):
    assert do(row, tokenizer) == Dropped("d.jsonl:3", reason)
    if "messages" not in row:
        assert do(row, plain_tokenizer) == Dropped("d.jsonl:3", reason)


def test_a_one_token_completion_is_trained(tokenizer):
    assert sum(do(chat("hello", "4"), tokenizer).completion) == 2


def test_too_long_rows_follow_the_policy(tokenizer):
    row = chat("the quick brown fox " * 20, "yes no " * 40)
    whole = do(row, tokenizer, max_length=4096)
    prompt = whole.completion.index(True)
    cut = do(row, tokenizer, max_length=64, max_prompt_length=32)
    begin, header = cut.completion.index(True), tokenizer("<|im_start|>user\n")["input_ids"]
    assert cut.truncated and len(cut) == 64 and 24 < begin <= 32
    kept = begin - len(header) - 1  # where the question is cut a token may begin within a word
    assert cut.input_ids[: len(header)] == header
    assert cut.input_ids[begin - kept :] == whole.input_ids[prompt - kept : prompt + 64 - begin]
    assert do(row, tokenizer, max_length=64, on_too_long="drop") == Dropped("d.jsonl:3", "too long")
    with pytest.raises(DataError, match=r"d\.jsonl:3.*max_length is 64"):
        do(row, tokenizer, max_length=64, on_too_long="error")
    assert do(row, tokenizer, max_length=64) == Dropped("d.jsonl:3", "prompt fills max_length")


def test_a_sample_of_a_million_characters_is_cut_in_time(tokenizer):
    start = time.process_time()
    example = do({"text": "the lazy dog " * 77_000}, tokenizer, max_length=128)
    assert isinstance(example, Example) and len(example) == 128 and example.truncated
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only German') }}", "only German"),
        ("{{ messages[9].content }}", "cannot render"),
        ("{{ 1 / 0 }}", "cannot render"),
        ("{% for %}", "cannot render"),
        (
            MARKED.replace("{{ m['content'] }}{% endgeneration %}", "{% endgeneration %}{{ m['content'] }}"),
            "marks no token",
        ),
        (
            "{% for m in messages %}{{ m.role }}> {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}bot: {% endif %}",
            "generation prompt is not how the turn begins",
        ),
    ],
)
def test_a_template_that_gives_no_mask_is_refused_naming_the_row(make_tokenizer, template, said):
    with pytest.raises(DataError, match=r"d\.jsonl:3") as caught:
        do(chat("a", "<think>x</think>b", "c", "d"), make_tokenizer(template))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) <= 6


def test_a_template_that_strips_thinking_trains_single_turn_rows(make_tokenizer):
    own = make_tokenizer(STRIPS)
    assert trained_text(do(chat("a", "<think>x</think>b"), own), own) == ["<think>x</think>b<|im_end|>"]


def test_a_template_that_strips_earlier_thinking_makes_a_sample_of_each_turn(make_tokenizer):
    own = make_tokenizer(STRIPS)
    sample = to_sample(chat("a", "<think>x</think>b", "c", "d"), "messages")
    first, second = render(sample, own, TextRules(512))
    assert trained_text(first, own) == ["<think>x</think>b<|im_end|>"]
    assert trained_text(second, own) == ["d<|im_end|>"] and "<think>" not in own.decode(second.input_ids)


def test_a_template_that_never_ends_is_stopped_within_two_seconds(make_tokenizer):
    start = time.process_time()
    with pytest.raises(DataError, match="still rendering"):
        do(chat("a", "b"), make_tokenizer(LOOP))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    "text", ["a\x00b", "a\u2028b", "\u202eabc", "\U0001f469\u200d\U0001f4bb", "e\u0301 \u00e9"]
)
def test_unusual_text_comes_back_exactly(tokenizer, text):
    assert trained_text(do(chat("q", text), tokenizer), tokenizer) == [text + "<|im_end|>"]


def test_pretokenised_rows_keep_their_ids_and_mask(tokenizer):
    example = do({"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, tokenizer)
    assert example.input_ids == [5, 6, 7, 8] and example.completion == [False, False, True, True]
    with pytest.raises(DataError, match=r"input_ids\[1\] is 9999"):
        do({"input_ids": [5, 9999]}, tokenizer)


def test_policies_that_cannot_be_are_config_errors(tokenizer):
    for setting in (
        {"on_too_long": "cut"},
        {"train_on": "prompt"},
        {"max_length": 1},
        {"max_prompt_length": 512},
    ):
        with pytest.raises(ConfigError):
            do(chat("a", "b"), tokenizer, **setting)
