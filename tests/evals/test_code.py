"""The program in a model's answer: every kind of fence, of several programs the last, functions and classes alike."""

from __future__ import annotations

import pytest

from selectkd.evals.code import code_blocks, exercise, program
from selectkd.evals.sandbox import level, run_tests

FENCES = (
    ("```python3\n{}```", True),
    ("~~~\n{}~~~", True),
    ("~~~py\n{}~~~", True),
    ("````python\n{}````", True),
    ("```Python 3\n{}```", True),
    ("```{{.python}}\n{}```", True),
    ("Here:\n```\n{}```\nDone.", True),
    ("```bash\npip install x\n```\n```python\n{}```", True),
    ("```python\n{}", True),
    ("```javascript\n{}```", False),
)


@pytest.mark.parametrize(("answer", "found"), FENCES)
def test_a_program_is_found_in_every_kind_of_fence(answer: str, found: bool) -> None:
    body = "def add(a, b):\n    return a + b\n"
    assert (code_blocks(answer.format(body)) == [body]) is found


def test_a_fence_in_a_list_loses_its_indentation() -> None:
    answer = "1. Like so:\n\n   ```python\n   def add(a, b):\n       return a + b\n   ```\n"
    assert code_blocks(answer) == ["def add(a, b):\n    return a + b\n"]


def test_of_two_programs_the_last_is_taken() -> None:
    one = exercise({"text": "Add.", "test_list": ["assert add(1, 2) == 3"]}, "x")
    first, last = (f"```python\ndef add(a, b):\n    return a {sign} b\n```" for sign in "-+")
    answer = f"{first}\nNo, rather:\n{last}"
    assert "a + b" in program(answer, one) and "a - b" not in program(answer, one)
    assert "a + b" in program(answer + "\n```python\nprint(add(1, 2))\n```", one)


def test_a_class_that_tests_call_is_wanted_too() -> None:
    record = {"text": "Chain.", "test_list": ["assert max_chain([Pair(5, 24), Pair(15, 25)], 2) == 2"]}
    one = exercise(record, "x")
    assert set(one.names) == {"max_chain", "Pair"}
    whole = (
        "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n\n"
        "def max_chain(arr, n):\n    return len(arr) if arr[0].b < arr[1].a + 99 else 0\n"
    )
    assert program(f"```python\n{whole}```\n```python\nprint('hello')\n```", one) == whole
    found = run_tests(whole, setup="", tests=one.tests, names=one.names, level=level())
    assert found.passed, found
    more = "one = Pair(5, 24)\nassert one.b == 24 and max_chain([one, one], 2) == 2 and one != Pair(5, 24)"
    assert run_tests(whole, setup="", tests=more, names=one.names, level=level()).passed
    wrong = "one = Pair(5, 24)\nassert one == 5"
    assert not run_tests(whole, setup="", tests=wrong, names=one.names, level=level()).passed


def test_methods_of_a_class_are_called_in_the_program() -> None:
    stack = "class Stack:\n    def __init__(self):\n        self.x = []\n"
    stack += "    def push(self, a):\n        self.x.append(a)\n"
    tests = "s = Stack()\ns.push(1)\ns.push(2)\nassert s.x == [1, 2]"
    assert run_tests(stack, setup="", tests=tests, names=("Stack",), level=level()).passed
    for attack in ("s = Stack()\nassert s.nothing == 1", "s = Stack()\nassert s.__class__ == 1"):
        assert not run_tests(stack, setup="", tests=attack, names=("Stack",), level=level()).passed


def test_an_object_equal_to_everything_still_passes_nothing() -> None:
    liar = "class add:\n    def __init__(self, *_):\n        pass\n    def __eq__(self, other):\n        return True\n"
    tests = "assert add(1, 2) == 3"
    assert not run_tests(liar, setup="", tests=tests, names=("add",), level=level()).passed
