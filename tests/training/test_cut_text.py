"""A cut is measured on a bounded length of text, whatever samples it has."""

import pytest

from selectkd.data.examples import Example
from selectkd.training.assembly import CUT_TOKENS, cut_text


@pytest.mark.parametrize(
    ("lengths", "chosen"),
    [
        ([100, 100, 100, 100, 84, 1], [100, 100, 100, 84]),
        ([CUT_TOKENS, 5], [CUT_TOKENS]),
        ([4000, 30, 2000], [30]),
        ([4000, 900, 2000], [900]),
        ([], []),
    ],
)
def test_the_first_samples_that_fit_are_chosen_else_the_shortest(lengths, chosen):
    samples = [Example([5] * n, [True] * n, stream=0, origin=f"a:{i}") for i, n in enumerate(lengths)]
    assert [len(sample.input_ids) for sample in cut_text(samples)] == chosen
