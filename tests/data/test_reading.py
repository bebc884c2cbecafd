"""The text of a recipe: ends of turns, templates, dates, held-out shares, what is lost, what cannot be packed."""

from __future__ import annotations

import json
import time
from collections import Counter

import pytest
import transformers
from transformers import GenerationConfig

from selectkd.config.load import recipe_from
from selectkd.config.yaml_text import read
from selectkd.data.example import Example
from selectkd.data.inspect import pieces
from selectkd.data.prompts import packed, prompt_keys
from selectkd.data.sources import Source
from selectkd.errors import ConfigError, DataError
from selectkd.models.packing import check_packing, problem
from selectkd.training.recipe_text import hold_out, read_text

CHAT = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"  # noqa: E501
DATED = (
    "{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = [
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}] * 2,
]


@pytest.fixture
def made(tmp_path, make_tokenizer):
    """(tokenizer, recipe) of a model folder without weights; changes: of the recipe's data."""

    def make(template=CHAT, ends=("<|user|>",), rows=ROWS, training=None, **data):
        roles = ["<|user|>", "<|assistant|>"]
        tokenizer = make_tokenizer(template, additional_special_tokens=roles, eos_token="<|endoftext|>")
        folder = tmp_path / "model"
        transformers.LlamaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        ids = [*tokenizer.convert_tokens_to_ids(list(ends)), 7]
        GenerationConfig(eos_token_id=ids).save_pretrained(folder)
        file = tmp_path / "text.jsonl"
        rows = [{"messages": row} if isinstance(row, list) else row for row in rows]
        file.write_text("\n".join(json.dumps(row) for row in rows))
        recipe = recipe_from(
            {
                "teacher": {"model": str(folder)},
                "student": {"model": str(folder)},
                "data": {"sources": [{"path": str(file)}], **data},
                "training": {"output_dir": "r", "max_steps": 1, "batch_size": 1, **(training or {})},
            }
        )
        return tokenizer, recipe

    return make


def trained(text, tokenizer):
    return [piece for piece, one in pieces(text.sources[0].examples[0], tokenizer) if one]


def test_a_turn_ends_in_a_token_of_the_generation_settings(made):
    tokenizer, recipe = made()
    text = read_text(recipe, tokenizer)
    assert trained(text, tokenizer) == ["a<|user|>", "a<|endoftext|>"]
    assert text.ends == frozenset(
        tokenizer.convert_tokens_to_ids(["<|user|>"])
    )  # 7 is a word, whatever a file says


@pytest.mark.parametrize("streaming", [False, True])
def test_a_held_out_file_with_prompts_that_are_trained_on_is_told(made, tmp_path, streaming):
    tokenizer, recipe = made(streaming=streaming, evaluation={"path": str(tmp_path / "text.jsonl")})
    (warning,) = read_text(recipe, tokenizer).warnings
    assert "1 of 1 training examples have a prompt that is held out too" in warning
    (tmp_path / "other.jsonl").write_text(json.dumps({"prompt": "Another one?", "completion": "a"}) + "\n")
    apart = made(streaming=streaming, evaluation={"path": str(tmp_path / "other.jsonl")})[1]
    assert not read_text(apart, tokenizer).warnings


def test_a_template_of_the_recipe_takes_the_place_of_the_tokenizers_and_goes_with_the_student(made, tmp_path):
    (tmp_path / "own.jinja").write_text(CHAT.replace("{{ m.content }}", "{{ m.content }}<|im_end|>"))
    tokenizer, recipe = made(chat_template=str(tmp_path / "own.jinja"))
    text = read_text(recipe, tokenizer)
    assert trained(text, tokenizer) == ["a<|im_end|>", "a<|im_end|>"]
    assert "<|im_end|>" in tokenizer.chat_template
    as_text = made(chat_template=tokenizer.chat_template)[1]
    assert read_text(as_text, tokenizer).sources[0].fingerprint == text.sources[0].fingerprint
    for wrong in ("nowhere.jinja", "tool_usse"):
        with pytest.raises(ConfigError, match=r"data\.chat_template"):
            read_text(made(chat_template=wrong)[1], tokenizer)


def test_arguments_are_part_of_a_templates_fingerprint(made):
    tokenizer, recipe = made(template_arguments={"x": 1})
    other = read_text(made()[1], tokenizer).template
    assert read_text(recipe, tokenizer).template.fingerprint != other.fingerprint != ""


def test_an_argument_that_the_template_does_not_read_is_warned_of(made):
    reading = CHAT + "{% if enable_thinking %}{% set mood = 1 %}{% endif %}"
    tokenizer, recipe = made(
        reading, template_arguments={"enable_thinkin": False, "range": 1, "enable_thinking": 1}
    )
    found = [line for line in read_text(recipe, tokenizer).warnings if "template_arguments" in line]
    assert len(found) == 2 and "enable_thinkin: the chat template reads no such variable" in found[0]
    assert found[0].endswith("Did you mean 'enable_thinking'?") and "template_arguments.range" in found[1]


def test_a_template_that_asks_for_the_date_is_given_one_for_the_whole_run(made):
    tokenizer, recipe = made(DATED)
    dated = read_text(recipe, tokenizer, date="2020-01-02T03:04:05")
    assert "02 Jan 2020" in tokenizer.decode(dated.sources[0].examples[0].input_ids)
    tokenizer, recipe = made(DATED, date="2021-05-06")
    assert read_text(recipe, tokenizer, date="2020-01-02").template.moment == "2021-05-06"


@pytest.mark.parametrize("template", [DATED, CHAT])
def test_doctor_knows_the_token_that_ends_each_samples_trained_text(made, template):
    from types import SimpleNamespace

    from selectkd.training.preflight.doctor import closed, ends_in

    tokenizer, recipe = made(template)
    text = read_text(recipe, tokenizer)
    plan = SimpleNamespace(text=text, tokenizer=tokenizer)
    assert all(closed(example, ends_in(plan)) for example in text.sources[0].examples)


def test_a_cache_of_another_date_or_template_is_refused_by_that_name(made, tmp_path):
    from selectkd.errors import CacheError
    from selectkd.teachers.cache.plan import CachePlan

    tokenizer, recipe = made(DATED)
    template = read_text(recipe, tokenizer, date="2020-01-02").template
    index = {"template": template.fingerprint, "date": "2020-01-02"}
    CachePlan(tmp_path, _index=index).check_template(template)
    with pytest.raises(CacheError, match="date: 2020-01-01 in the cache, 2020-01-02 wanted"):
        CachePlan(tmp_path, _index={**index, "date": "2020-01-01"}).check_template(template)
    with pytest.raises(CacheError, match="template: x in the cache"):
        CachePlan(tmp_path, _index={**index, "template": "x"}).check_template(template)


def asking(*prompts):
    return [
        Example([1, 2], [False, True], 0, f"f:{i}", prompt=packed(prompt_keys(p)))
        for i, p in enumerate(prompts)
    ]


def question(number):
    """A question that shares no three words with another one's."""
    return " ".join(f"w{number}x{place}" for place in range(12))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.25, 0.29, 0.4, 0.45, 0.5, 0.7, 0.9])
def test_a_held_out_share_is_that_share_of_each_source_wherever_its_rows_stand(share):
    examples = asking(*map(question, range(100)))
    kept, held, warnings = hold_out(
        [Source.of(examples), Source.of(asking(*map(question, range(100, 120))))], share
    )
    assert len(held) == round(100 * share) + int(20 * share + 1e-9) and not warnings
    assert [len(source) for source in kept] == [100 - round(100 * share), 20 - int(20 * share + 1e-9)]
    turned = hold_out([Source.of(examples[::-1])], share)[1]
    alone = hold_out([Source.of(examples)], share)[1]
    assert {one.origin for one in turned} == {one.origin for one in alone}


def test_duplicates_and_rewordings_of_a_prompt_stand_on_one_side():
    plain = [question(number) for number in range(40)]
    louder = [text.upper() + "!" for text in plain]
    reworded = [" ".join(["please", *text.split()]) for text in plain]
    kept, held, warnings = hold_out([Source.of(asking(*plain, *louder, *reworded))], 0.4)
    numbers = [{int(one.origin[2:]) % 40 for one in side} for side in (held, kept[0].examples)]
    assert len(held) == 48 and not numbers[0] & numbers[1] and not warnings
    both = [Source.of(asking(*plain)), Source.of(asking(*louder))]
    kept, held, _ = hold_out(both, 0.25)
    assert [len(source) for source in kept] == [30, 30]
    assert len({one.origin for one in held}) == 10


def test_a_share_that_would_part_a_prompt_says_so():
    once, often = [question(number) for number in range(60)], [question(100)] * 60
    _, held, warnings = hold_out([Source.of(asking(*once, *often))], 0.25)
    assert len(held) == 30 and "60 samples of nearly one prompt are all trained on" in warnings[0]
    _, held, warnings = hold_out([Source.of(asking(*[f"{question(0)} {n}" for n in range(100)]))], 0.25)
    assert len(held) == 25 and "nearly equal prompts stand on both sides" in warnings[0]
    with pytest.raises(ConfigError, match="holds none out; duplicates of a prompt stay together"):
        hold_out([Source.of(asking(*often))], 0.25)


def test_the_samples_of_one_conversation_stand_on_one_side(made):
    rows = [
        [{"role": "user", "content": question(i)}, {"role": "assistant", "content": "<think>y</think>a"}] * 2
        for i in range(20)
    ]
    thinking = CHAT.replace(
        "{{ m.content }}", "{{ m.content if loop.last else m.content.split('</think>')[-1] }}"
    )
    tokenizer, recipe = made(thinking, rows=rows, evaluation=0.3)
    text = read_text(recipe, tokenizer)
    sides = [Counter(one.origin for one in side) for side in (text.heldout, text.sources[0].examples)]
    assert sorted(map(len, sides)) == [6, 14] and {*sides[0].values(), *sides[1].values()} == {2}


def test_what_is_cut_or_left_out_is_counted_by_reason(made):
    long = [{"role": "user", "content": "word " * 60}, {"role": "assistant", "content": "a"}]
    tokenizer, recipe = made(rows=[*ROWS, long], training={"max_length": 64, "max_prompt_length": 16})
    text = read_text(recipe, tokenizer)
    assert "1 prompts cut to max_prompt_length 16" in text.warnings[0] and "of 2 records" in text.warnings[0]


def test_tool_schemas_that_the_chat_template_leaves_out_are_counted(made):
    tools = [{"type": "function", "function": {"name": "look", "description": "looks up a place"}}]
    rows = [{"messages": ROWS[0], "tools": tools}, {"messages": ROWS[0]}, {"messages": ROWS[0], "tools": []}]
    tokenizer, recipe = made(rows=rows)
    (told,) = read_text(recipe, tokenizer).warnings
    assert "of 3 records 1 without their tool schemas" in told and "data.chat_template" in told
    # written where a system prompt is alone: a rule by the template's text would take it for one that writes them
    partly = "{% if tools and messages[0].role == 'system' %}{{ tools | tojson }}{% endif %}" + CHAT
    with_system = {"messages": [{"role": "system", "content": "s"}, *ROWS[0]], "tools": tools}
    tokenizer, recipe = made(partly, rows=[*rows, with_system])
    (told,) = read_text(recipe, tokenizer).warnings
    assert "of 4 records 1 without their tool schemas" in told
    tokenizer, recipe = made("{{ (tools or '') | string }}" + CHAT, rows=rows)
    assert read_text(recipe, tokenizer).warnings == []


def test_a_long_row_is_cut_before_it_is_tokenised(made):
    rows = [
        [{"role": "user", "content": "word " * 400_000}, {"role": "assistant", "content": "yes " * 400_000}]
    ]
    tokenizer, recipe = made(rows=rows, training={"max_length": 64, "max_prompt_length": 16})
    start = time.process_time()
    example = read_text(recipe, tokenizer).sources[0].examples[0]
    assert len(example) == 64 and example.completion.index(True) == 16 and example.cut_prompt
    assert "yes yes" in tokenizer.decode(example.input_ids[16:])
    assert time.process_time() - start < 20


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}", "{{ 'a'.ljust(10**10) }}", "{{ [0] * 10**10 }}", "{{ 10 ** (10 ** 9) }}",
        "{{ '%10000000000d' % 1 }}", "{% for a in range(99999) %}{% for b in range(99999) %}{{ messages }}{% endfor %}"
        "{% endfor %}",
    ],
)  # fmt: skip
def test_a_template_that_asks_for_all_memory_or_time_is_refused_by_row(made, template):
    tokenizer, recipe = made(template)
    with pytest.raises(DataError, match=r"text\.jsonl:1: the chat template"):
        read_text(recipe, tokenizer)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.Gemma3TextConfig(sliding_window=16), None),
        (transformers.MistralConfig(sliding_window=16), None),
        (transformers.Llama4TextConfig(attention_chunk_size=16), "chunks have 16 tokens"),
        (transformers.Qwen3_5TextConfig(), "linear_attention"),
        (transformers.MambaConfig(), "linear_attention"),
        (transformers.Lfm2Config(num_hidden_layers=2, layer_types=["conv", "full_attention"]), "conv"),
        (transformers.JambaConfig(), "linear_attention"),
        (transformers.MptConfig(), "places"),
        (transformers.FalconConfig(alibi=True), "places"),
        (transformers.BartConfig(), "counts places"),
        (transformers.MBartConfig(), "counts places"),
        (transformers.PegasusConfig(), "counts places"),
        (transformers.TrOCRConfig(), "counts places"),
        (transformers.OpenAIGPTConfig(), "no mask"),
        (transformers.GPT2Config(), None),
        (transformers.LlamaConfig(), None),
        (transformers.MistralConfig(sliding_window=4096), None),
        (transformers.Qwen3Config(), None),
        (transformers.FalconConfig(), "no mask"),
    ],
    ids=lambda one: getattr(one, "model_type", str(one)),
)
def test_models_that_would_mix_packed_samples_are_known_by_their_configuration(config, said):
    found = problem(config, 64)
    assert found is None if said is None else found is not None and said in found


def test_a_model_that_cannot_pack_is_refused_by_name(tmp_path):
    transformers.Qwen3NextConfig(num_hidden_layers=4).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"packing: the teacher .*linear_attention in layers 0, 1, 2"):
        check_packing(tmp_path, 64, role="the teacher")


@pytest.mark.parametrize("text", ["a: [" + "1," * 490_000 + "1]", "a: [" + "1," * 100_000 + "1]"])
def test_a_list_that_no_recipe_has_is_refused_quickly(text):
    start = time.process_time()
    with pytest.raises(ConfigError, match=r"a recipe may have|A recipe has at most"):
        read(text, source="recipe.yaml")
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    ("selection", "said"),
    [
        ({"selector": "tip"}, (None, "tip")),
        ({"verifier": "spec_k", "k": 3}, ("spec_k", None)),
        ({"verifer": "spec_k"}, "Did you mean verifier"),
        ({"verifier": 5}, "must be a name"),
        ({"verifier": "spec_k", "selector": "tip", "k": 5}, "could belong to either"),
    ],
)
def test_selection_is_a_checked_section(made, selection, said):
    values = made()[1].model_dump(exclude={"objective", "method"}, exclude_none=True)
    values = {**values, "selection": selection}
    if isinstance(said, str):
        with pytest.raises(ConfigError, match=said):
            recipe_from(values)
        return
    objective = recipe_from(values).objective
    assert tuple(one and one["name"] for one in (objective.verifier, objective.selector)) == said
