"""Programs a model writes: prompts of HumanEval and MBPP, the program in an answer, and pass@k.

n samples of a problem, c of them right, k tries.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from selectkd.errors import DataError

STOP = ("\ndef ", "\nclass ", "\nif ", "\nprint", "\n#", "\nassert", "\n```")
"""Where a base model's completion of a function has gone on to something else. Source: HumanEval (arXiv 2107.03374)."""
FENCE = re.compile(r"```[ \t]*(?:python|py|Python)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Exercise:
    """One problem: what a model reads, what the tests need, the tests, and the names they call.

    begun: the beginning of the program, which a completion goes on from; "" where the model writes all of it.
    """

    name: str
    prompt: str
    begun: str
    setup: str
    tests: str
    names: tuple[str, ...]


def exercise(record: Mapping[str, Any], origin: str) -> Exercise:
    """The exercise of a record of HumanEval's shape {task_id, prompt, test, entry_point} or MBPP's {text or prompt,
    test_list, test_setup_code}. DataError for another.
    """
    if {"prompt", "test", "entry_point"} <= record.keys():
        entry = str(record["entry_point"])
        return Exercise(
            name=str(record.get("task_id", origin)),
            prompt=f"Complete this Python function. Give the whole function in one code block.\n\n```python\n"
            f"{record['prompt']}```",
            begun=str(record["prompt"]),
            setup=str(record["prompt"]),
            tests=f"{record['test']}\ncheck({entry})",
            names=(entry,),
        )
    asked = record.get("text") or record.get("prompt")
    if asked and isinstance(record.get("test_list"), list) and record["test_list"]:
        tests = "\n".join(map(str, record["test_list"]))
        setup = str(record.get("test_setup_code") or "\n".join(record.get("test_imports") or []))
        return Exercise(
            name=str(record.get("task_id", origin)),
            prompt=f"{asked}\nYour code should pass these tests:\n\n{tests}\n\nGive it in one code block.",
            begun="",
            setup=setup,
            tests=tests,
            names=called(tests, origin),
        )
    raise DataError(
        f"{origin}: no coding problem. It needs prompt, test and entry_point (HumanEval), or text and test_list (MBPP)."
    )


def called(tests: str, origin: str) -> tuple[str, ...]:
    """The functions that tests call and neither Python nor they themselves define, in order.

    >>> called("assert add(len('a'), 2) == 3", "x")
    ('add',)
    """
    import builtins

    try:
        tree = ast.parse(tests)
    except SyntaxError as error:
        raise DataError(f"{origin}: its tests are not Python: {error}.") from error
    calls = [
        one.func.id for one in ast.walk(tree) if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
    ]
    return tuple(dict.fromkeys(name for name in calls if not hasattr(builtins, name)))


def program(answer: str, one: Exercise) -> str:
    """The program in an answer: the first code block that defines a wanted name, else the first block, else the answer
    itself, behind what was begun unless it defines the name again.
    """
    blocks = FENCE.findall(answer)
    defines = [
        block for block in blocks if any(re.search(rf"^def {re.escape(n)}\b", block, re.M) for n in one.names)
    ]
    chosen = (defines or blocks or [answer])[0]
    whole = defines or any(re.search(rf"^def {re.escape(n)}\b", chosen, re.M) for n in one.names)
    if not one.begun:
        return chosen
    # a chat model repeats the function and may leave out the imports above it; a base model goes on in its body
    return one.begun[: one.begun.rfind("\ndef ") + 1] + chosen if whole else one.begun + chosen


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): the chance that one of k tries drawn from n is right; unbiased for a new set of k.

    Source: Chen et al., Evaluating large language models trained on code, arXiv 2107.03374, equation 1.

    >>> round(pass_at_k(10, 3, 1), 12), pass_at_k(4, 2, 3)
    (0.3, 1.0)
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise DataError(f"pass@{k} of {c} right among {n} samples: write at least k samples a problem.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)
