"""Rows rendered under the templates of the zoo."""

from __future__ import annotations

from data.template_zoo import MOMENT
from selectkd.data.formats import to_sample
from selectkd.data.inspect import pieces
from selectkd.data.render import TextRules, render
from selectkd.data.template import ChatTemplate


def examples(row, tokenizer, *, arguments=None, **rules):
    template = ChatTemplate.of(tokenizer, arguments=arguments, moment=MOMENT)
    sample = to_sample(row, "messages", origin="d.jsonl:3")
    return render(sample, tokenizer, TextRules(**{"max_length": 4096, **rules}), template=template)


def trained(row, tokenizer, **options):
    """The trained text of each example."""
    return [
        "|".join(text for text, one in pieces(example, tokenizer) if one)
        for example in examples(row, tokenizer, **options)
    ]
