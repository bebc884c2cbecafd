# ruff: noqa: E501, RUF001  (tables of answers, one line for several; full-width letters are among them)
"""MathVista's free answers, MMMU's open ones and OCRBench's texts: written by hand, with the traps of each rule."""

from __future__ import annotations

from fractions import Fraction

import pytest

from selectkd.errors import DataError
from selectkd.evals.vision.open_answers import (
    HANDWRITTEN_MATHEMATICS,
    contains_text,
    open_answer_matches,
)
from selectkd.evals.vision.values import literal_list, same_value, stated_list, stated_number

HALF, WORDS = Fraction(1, 2), "Scene Text-centric VQA"

NUMBERS = [
    ("14", 14), ("14.", 14), ("**14**", 14), ("-7", -7), ("−7", -7), ("１４", 14), ("14 cm", 14), ("45%", 45),
    ("$1.45", Fraction("1.45")), ("1,234", 1234), ("1,234.5 m", Fraction("1234.5")), ("1e3", 1000),
    ("3/4", Fraction(3, 4)), (r"\frac{3}{4}", Fraction(3, 4)), (r"$\dfrac{3}{4}$", Fraction(3, 4)),
    ("1 1/2", Fraction(3, 2)), (r"2 \times 10^{3}", 2000), ("½", HALF), ("0.50", HALF), ("12 m²", 12),
    (r"\boxed{12}", 12), (r"3 + 4 = 7, hence \boxed{7}", 7), (r"\boxed{1{,}200\text{ m}^2}", 1200),
    ("The answer is 14.", 14), ("Answer: 14", 14), ("**Answer:** 0.6", Fraction("0.6")),
    ("The answer is 5, since 2 + 3 = 5.", 5), ("The answer is 7 because 12 of 20 are red.", 7),
    ("The answer is three.", 3), ("the answer is -1/2", -HALF), ("The final answer is 2 * 3 = 6.", 6),
    ("The answer is 3. Sorry: the answer is 4.", 4), ("The answer is between 3 and 5.", None),
    ("The number missing in the sequence is 14.", 14), ("There are 3 red and 4 blue balls, so 7.", 7),
    ("3 red, 4 blue. In total there are 7 balls.", 7), ("10 - 4 = 6", 6), ("2 + 2 is 4 apples", 4),
    ("There are two.", 2), ("There are exactly seven dogs in it.", 7), ("two", 2), ("Eleven.", 11),
    ("One of them is red.", None), ("There are two hundred people.", None), ("7 of the 12 are red", None),
    ("It is 3 or 4", None), ("The answer is 3 or 4.", None), ("The answer is 3-5.", None), ("3 to 5", None),
    ("I cannot tell.", None), ("", None), ("There is no number.", None), ("The one on the left.", None),
    ("Sorry, I can't help with images of people.", None), ("<think>maybe 3</think>The answer is 4.", 4),
    ("<think>it is 5 or", None), ("Figure 2 shows 5 lines and 3 dots in the left part of it.", None),
    ("It has 8 sides. Yes, 8.", 8), ("The answer is unclear: 3 lines or 5 lines can be seen.", None),
    ("The width is 3.5 cm.", Fraction("3.5")), ("At 20°C", 20), ("They differ by 1,000,000.", 1000000), ("7 are blue, 12 red", None),
    ("I see 3 chairs. The picture has 2 tables.", None), ("5 rows of 4 makes 20 seats in all.", None),
]  # fmt: skip

VALUES = [
    ("14", "14", "integer", None, True), ("14.0", "14", "integer", None, True), ("14.9", "14", "integer", None, True),
    ("15", "14", "integer", None, False), ("twelve", "12", "integer", None, True), ("?", "14", "integer", None, None),
    ("1.449", "1.45", "float", 2, True), ("1.44", "1.45", "float", 2, False), ("0.6", "0.6", "float", 1, True),
    ("3/5", "0.6", "float", 1, True), ("0.64", "0.6", "float", 1, True), ("0.66", "0.6", "float", 1, False),
    ("[2007, 2008]", "[2007, 2008]", "list", None, True), ("[2008, 2007]", "[2007, 2008]", "list", None, False),
    ("from [1] to **[2007, 2008]**.", "[2007, 2008]", "list", None, True),
    ("2007 and 2008", "[2007, 2008]", "list", None, None), ("[1.20, 3]", "[1.2, 3.0]", "list", None, True),
    ("[a, b]", "[1, 2]", "list", None, None), ("[1, 2, 3]", "[1, 2]", "list", None, False),
]  # fmt: skip

OPEN = [
    ("12.5", ["12.5"], True), ("12.50", ["12.5"], True), ("12.504", ["12.5"], True), ("12.51", ["12.5"], False),
    ("The gain is 12.5 dB", ["12.5"], True), ("1,234", ["1234"], True), ("1234 N", ["1,234"], True), ("-5", ["5"], False),
    ("5", ["-5"], False), ("1.2e3", ["1200"], True), ("x = 3\nso y = 4", ["4"], True), ("x = 3\nso y = 4", ["3"], False),
    ("2 + 2 = 4", ["4"], True), ("Therefore the result is 9.", ["9"], True), ("the value could be 3", ["3"], True),
    ("Mitral valve", ["mitral valve"], True), ("It is the MITRAL valve.", ["mitral valve"], True),
    ("the mitral valve area", ["mitral valve"], True), ("aortic valve", ["mitral valve"], False),
    ("It is a mitral valve", ["aortic", "mitral"], True), ("not a mitral valve", ["mitral valve"], True),
    ("I don't know.", ["mitral valve"], False), ("", ["3"], None), (" . ", ["3"], None),
    ("The answer is B", ["b"], True), ("vitamin b is in it b ", ["b"], True), ("bees", ["b"], False), ("a b c", ["b"], True),
    ("answer 7", ["7.0"], True), ("7 apples and 9 pears", ["9"], True), ("7 apples and 9 pears", ["8"], False),
    ("**42**", ["42"], True), ("$42", ["42"], True), ("42%", ["42"], True), ("3/4", ["0.75"], False),
    (r"\frac{3}{4}", ["3/4"], False), ("The ratio is 3/4", ["3/4"], True), ("４２", ["42"], True),
    ("<think>is it 5?</think>It is 6", ["5"], False), ("<think>is it 5?</think>It is 6", ["6"], True),
    ("<think>it is 6", ["6"], None), ("so", ["so"], True), ("the result is:", ["3"], False),
    ("Because of 3, the final answer is 10", ["10"], True), ("Because of 3, the final answer is 10", ["3"], False),
    ("The first is 3. The second is 4", ["4"], True), ("The first is 3. The second is 4", ["3"], False),
    ("none of the above", ["above"], True), ("None", ["none of the above"], False), ("0.1", ["0.10"], True),
    ("0.104", ["0.1"], True), ("1000000", ["1,000,000"], True), ("10,00", ["1000"], True), ("ten", ["10"], False),
    ("Plan A", ["plan a"], True), ("$6.35 million", ["6.35"], True), ("6.35 million", ["6350000"], False),
    ("It takes 30 seconds\nand 2 minutes", ["30"], True), ("E = mc^2", ["mc^2"], True), ("e=mc2", ["mc^2"], False),
    ("Paris, France", ["france", "germany"], True), ("Sorry, I can't help with that.", ["sulphur"], False),
    ("(B) 3.14", ["3.14"], True), ("3.14159", ["3.14"], True), ("3.146", ["3.14"], False),
]  # fmt: skip

MATH = HANDWRITTEN_MATHEMATICS
TEXTS = [
    ("STOP", ["stop"], WORDS, True), ("It says Stop!", ["STOP"], WORDS, True), ("stopped", ["stop"], WORDS, True),
    ("sto p", ["stop"], WORDS, False), ("not stop", ["stop"], WORDS, True), ("**Stop**", ["stop"], WORDS, True),
    ("s**to**p", ["stop"], WORDS, False), ("The word is GO.", ["stop", "go"], WORDS, True), ("", ["stop"], WORDS, None),
    (" \n", ["stop"], WORDS, None), ("I cannot read it.", ["stop"], WORDS, False), ("two\nlines", ["two lines"], WORDS, True),
    ("two lines", ["two\nlines"], WORDS, True), ("two  lines", ["two lines"], WORDS, False), ("ＳＴＯＰ", ["stop"], WORDS, False),
    ("$1,200", ["1,200"], WORDS, True), ("1200", ["1,200"], WORDS, False), ("1,200.50", ["1,200"], WORDS, True),
    ("12", ["1"], WORDS, True), ("Total: 12.00", ["12.00"], WORDS, True), ("12.0", ["12.00"], WORDS, False),
    ("ÉCOLE", ["école"], WORDS, True), ("ECOLE", ["école"], WORDS, False), ("don't", ["don’t"], WORDS, False),
    ("<think>STOP</think>GO", ["stop"], WORDS, False), ("<think>STOP</think>GO", ["go"], WORDS, True),
    ("<think>STOP", ["stop"], WORDS, None), (" stop ", [" Stop "], WORDS, True), ("2019-05-01", ["2019-05-01"], WORDS, True),
    ("1 May 2019", ["2019-05-01"], WORDS, False), ("A B C", ["abc"], WORDS, False), ("abc", ["A B C"], WORDS, False),
    ("The digits are 0042", ["0042"], "Digit String Recognition", True), ("42", ["0042"], "Digit String Recognition", False),
    ("xqzt", ["XQZT"], "Non-Semantic Text Recognition", True), ("xqz t", ["XQZT"], "Non-Semantic Text Recognition", False),
    ("Sorry, I can't help.", ["can"], WORDS, True), ("none of the above", ["above"], WORDS, True),
    ("Answer: (B) CENTRE", ["centre"], WORDS, True), ("center", ["centre"], WORDS, False),
    ("x^2", ["x^2"], MATH, True), ("x ^ 2", ["x^2"], MATH, True), ("$x^{2}$", ["x^{2}"], MATH, True),
    ("X^2", ["x^2"], MATH, False), ("x^{2}", ["x^2"], MATH, False), ("x^2\n+ y", ["x^2 + y"], MATH, True),
    (r"\frac{3}{4}", [r"\frac {3} {4}"], MATH, True), (r"\frac34", [r"\frac{3}{4}"], MATH, False),
    (r"\dfrac{3}{4}", [r"\frac{3}{4}"], MATH, False), ("3/4", [r"\frac{3}{4}"], MATH, False),
    (r"It reads \sqrt { a + b } .", [r"\sqrt{a+b}"], MATH, True), (r"\sqrt{a-b}", [r"\sqrt{a+b}"], MATH, False),
    ("a = b", ["a=b", "b=a"], MATH, True), ("b = a", ["a=b", "b=a"], MATH, True), ("b ≠ a", ["a=b", "b=a"], MATH, False),
    ("", ["x"], MATH, None), ("a\tb", ["ab"], MATH, False), ("ab", ["a b"], MATH, True), ("alpha", [r"\alpha"], MATH, False),
    (r"\alpha+1", [r"\alpha + 1"], MATH, True),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), NUMBERS)
def test_a_number_is_read_where_the_answer_says_so(answer: str, expected: Fraction | int | None) -> None:
    assert stated_number(answer) == expected


@pytest.mark.parametrize(("answer", "right", "kind", "decimals", "expected"), VALUES)
def test_a_value_is_compared_by_the_published_normalisation(
    answer: str, right: str, kind: str, decimals: int | None, expected: bool | None
) -> None:
    assert same_value(answer, right, kind, decimals) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize(("answer", "right", "expected"), OPEN)
def test_an_open_answer_matches_by_mmmus_rule(answer: str, right: list[str], expected: bool | None) -> None:
    assert open_answer_matches(answer, right) is expected


@pytest.mark.parametrize(("answer", "right", "category", "expected"), TEXTS)
def test_a_text_is_contained_by_ocrbenchs_rule(
    answer: str, right: list[str], category: str, expected: bool | None
) -> None:
    assert contains_text(answer, right, category) is expected


def test_each_rule_has_at_least_sixty_answers() -> None:
    assert min(len(NUMBERS), len(OPEN), len(TEXTS)) >= 60


def test_a_right_answer_of_another_kind_is_an_error_and_no_wrong_answer() -> None:
    with pytest.raises(DataError, match="no number"):
        same_value("3", "three", "integer")
    with pytest.raises(DataError, match="no list"):
        same_value("[3]", "3", "list")
    assert literal_list("['a', 'b']") == ["a", "b"] == literal_list('["a", "b"]')
    assert literal_list("a, b") is None and stated_list("none") is None
