# ruff: noqa: RUF001  (tables of answers, one line for several; full-width letters are among them)
"""Options that an answer names: written by hand, with the traps that a reader of letters falls into."""

from __future__ import annotations

import pytest

from selectkd.evals.vision.options import chosen_option

PETS = {"A": "cat", "B": "dog", "C": "bird", "D": "None of the above"}
COUNTS = {"A": "2", "B": "3", "C": "12", "D": "13"}
COLOURS = {"A": "red", "B": "dark red", "C": "blue", "D": "green"}
VITAMINS = {"A": "vitamin C", "B": "vitamin D", "C": "vitamin A", "D": "vitamin B"}
FRACTIONS = {"A": "3/11", "B": "8/11", "C": r"$\frac{6}{11}$", "D": "3/5"}
MONEY = {"A": "$1,200", "B": "$12,000", "C": "$120", "D": "$12"}
LABELS = {"A": "E", "B": "F", "C": "A", "D": "G"}
TRUTH = {"A": "Yes", "B": "No"}
LONG = {"A": "3 cm", "B": "3 m", "C": "30 cm", "D": "-3 cm"}
NINE = {letter: f"item {number}" for number, letter in enumerate("ABCDEFGHI")}

ANSWERS = [
    # a letter alone
    ("B", PETS, "B"),
    ("b", PETS, "B"),
    ("(b)", PETS, "B"),
    ("B.", PETS, "B"),
    (" [B] ", PETS, "B"),
    ("Ｂ", PETS, "B"),
    ("（Ｂ）", PETS, "B"),
    ("**B**", PETS, "B"),
    ("`B`", PETS, "B"),
    ("Option C", PETS, "C"),
    ("E", PETS, None),
    ("", PETS, None),
    ("<think>A or B? A has fur.</think>B", PETS, "B"),
    ("<think>It must be A", PETS, None),
    # stated
    ("Answer: (B) because A is wrong", PETS, "B"),
    ("The answer is A.", PETS, "A"),
    ("the answer is a.", PETS, "A"),
    ("The answer is a dog.", PETS, "B"),
    ("The correct answer is **B**. Here's why: A shows no whiskers.", PETS, "B"),
    ("Final answer: C", PETS, "C"),
    ("A and B look alike, but the correct option is C.", PETS, "C"),
    ("The answer is not A but B.", PETS, "B"),
    ("The answer isn't B.", PETS, None),
    ("The wrong answer is B.", PETS, None),
    ("The answer is A or B.", PETS, None),
    ("The answer is A. Wait, no: it must be B.", PETS, None),
    ("First I thought the answer is A. Looking again, the answer is B.", PETS, "B"),
    (r"Looking at the ears, \boxed{B}", PETS, "B"),
    (r"So the answer is $\boxed{\text{C}}$.", PETS, "C"),
    ("答案是B。", PETS, "B"),
    ("选C", PETS, "C"),
    ("B is correct, since C has feathers.", PETS, "B"),
    ("Both A and B are correct.", PETS, None),
    ("I would choose D", PETS, "D"),
    ("The answer is I.", NINE, "I"),
    ("The answer is I think unclear.", NINE, None),
    # begins with a letter
    ("B. dog", PETS, "B"),
    ("(B) because A is wrong", PETS, "B"),
    ("B) a dog on a sofa", PETS, "B"),
    ("b) dog", PETS, "B"),
    ("C: it has wings", PETS, "C"),
    ("B because A has no tail", PETS, "B"),
    ("A. cat\nB. dog\nC. bird", PETS, None),
    ("(A) cat (B) dog (C) bird", PETS, None),
    ("B. cat", PETS, None),
    ("A, B and C are all visible.", PETS, None),
    # one letter named, others denied
    ("It can only be C.", PETS, "C"),
    ("Neither A nor B; it has feathers, so C", PETS, "C"),
    ("A and D are wrong. C fits.", PETS, "C"),
    ("I rule out A, so B or C.", PETS, None),
    ("Not B.", PETS, None),
    ("Either B or C", PETS, None),
    ("B, C", PETS, None),
    ("A clear answer cannot be given.", PETS, None),
    # the text of an option
    ("dog", PETS, "B"),
    ("A dog.", PETS, "B"),
    ("The animal is a dog, not a cat.", PETS, "B"),
    ("There is no cat here.", PETS, None),
    ("A cat chases a dog.", PETS, None),
    ("None of the above", PETS, "D"),
    ("none of the above.", PETS, "D"),
    ("None of them", PETS, None),
    ("Sorry, I cannot tell whether this is a dog.", PETS, None),
    ("I'm unable to see the image.", PETS, None),
    ("It is not possible to say if it is a bird; I don't know.", PETS, None),
    ("The picture shows a hotdog.", PETS, None),
    ("There is a dog. Behind it is a tree.", PETS, None),
    ("A long story about a park. The answer is the dog on the left.", PETS, "B"),
    ("There are 3 dogs.", COUNTS, "B"),
    ("3", COUNTS, "B"),
    ("13", COUNTS, "D"),
    ("There are 1,300 of them.", COUNTS, None),
    ("Between 2 and 3.", COUNTS, None),
    ("It is dark red.", COLOURS, "B"),
    ("RED", COLOURS, "A"),
    ("The label shows vitamin C.", VITAMINS, "A"),
    ("C", VITAMINS, "C"),
    ("The answer is C, vitamin A.", VITAMINS, "C"),
    ("8/11", FRACTIONS, "B"),
    (r"\frac{8}{11}", FRACTIONS, "B"),
    (r"The answer is $\dfrac{6}{11}$", FRACTIONS, "C"),
    ("1200 dollars", MONEY, "A"),
    ("$1200", MONEY, "A"),
    ("It costs $12,000.", MONEY, "B"),
    ("E", LABELS, "A"),
    ("A", LABELS, "A"),
    ("No, it does not.", TRUTH, "B"),
    ("3 cm", LONG, "A"),
    ("It measures -3 cm.", LONG, "D"),
    ("30 cm long", LONG, "C"),
    ("The region marked B is the cat.", PETS, None),
]


@pytest.mark.parametrize(("answer", "options", "expected"), ANSWERS)
def test_an_option_is_read_as_a_person_reads_it(
    answer: str, options: dict[str, str], expected: str | None
) -> None:
    assert chosen_option(answer, options) == expected


def test_there_are_at_least_sixty_answers_and_none_stands_twice() -> None:
    assert len(ANSWERS) >= 60
    assert len({(answer, str(options)) for answer, options, _ in ANSWERS}) == len(ANSWERS)


def test_options_in_another_order_move_the_letter_and_nothing_else() -> None:
    turned = {"A": "dog", "B": "bird", "C": "None of the above", "D": "cat"}
    for answer in ("dog", "A dog.", "The answer is a dog.", "The animal is a dog, not a cat."):
        assert PETS[str(chosen_option(answer, PETS))] == turned[str(chosen_option(answer, turned))] == "dog"
