# ruff: noqa: E501, RUF001  (tables of answers, one line for several; full-width letters are among them)
"""Yes or no that an answer says, and groups of questions that are right together: written by hand."""

from __future__ import annotations

import pytest

from selectkd.evals.vision.yes_no import all_right, yes_or_no

ANSWERS = [
    ("Yes", "yes"), ("yes.", "yes"), ("YES!", "yes"), ("**Yes**", "yes"), ("`no`", "no"), ("No", "no"), ("no.", "no"),
    ("Ｙｅｓ", "yes"), ("(No)", "no"), ("[Yes]", "yes"), ('"No"', "no"), ("Yes, it is.", "yes"), ("No, it is not.", "no"),
    ("No it isn't", "no"), ("No there are not", "no"), ("Yes there are", "yes"), ("Answer: yes", "yes"),
    ("Answer: No.", "no"), ("The answer is no.", "no"), ("The answer is **no**.", "no"), ("So the answer is yes", "yes"),
    ("Final answer: Yes", "yes"), ("Yes or no: no", "no"), ("Answer yes or no.", None), ("yes/no", None),
    ("Yes and no.", None), ("Yes. No.", None), ("Yes, no circle is larger.", "yes"), ("There are no people.", None),
    ("No people can be seen.", None), ("No one is there.", None), ("It is no longer red.", None), ("nothing", None),
    ("not", None), ("know", None), ("Yesterday", None), ("Noon", None), ("", None), ("I don't know.", None),
    ("Sorry, I can't help with that.", None), ("It is true.", None), ("Correct", None), ("Indeed", None),
    ("At first sight yes, but the answer is no.", "no"), ("It is not a yes.", None), ("I'd say no", "no"),
    ("I would say: yes, because both lines are equal.", "yes"), ("No, because they differ.", "no"),
    ("No because they differ.", "no"), ("No since the left one is larger", "no"), ("Neither yes", None),
    ("<think>yes?</think>No", "no"), ("<think>no</think>", None), ("<think>Yes", None), (r"\boxed{\text{Yes}}", "yes"),
    ("No.\nThe circles have the same size.", "no"), ("Yes\nNo", None), ("no\n", "no"), ("no, no and no", "no"),
    ("Yes, they are not the same", "yes"), ("The left one, no?", "no"), ("Yes — both.", "yes"), ("No – neither.", "no"),
    ("A: yes", "yes"), ("The answer is no circle.", None), ("The answer is yes. No, wait, the answer is no.", "no"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "expected"), ANSWERS)
def test_yes_or_no_is_read_as_a_person_reads_it(answer: str, expected: str | None) -> None:
    assert yes_or_no(answer) == expected


def test_there_are_at_least_sixty_answers_and_none_stands_twice() -> None:
    assert len(dict(ANSWERS)) == len(ANSWERS) >= 60


def test_a_figure_is_right_where_all_its_questions_are_and_a_question_where_all_its_figures_are() -> None:
    # two figures of one set, two questions of each; the second question of figure 1 is wrong
    scores, figures, questions = [1.0, 1.0, 1.0, 0.0], ["0", "0", "1", "1"], ["a", "b", "a", "b"]
    assert all_right(scores, figures) == [1.0, 0.0]
    assert all_right(scores, questions) == [1.0, 0.0]
    assert all_right([], []) == []
