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
FENCE = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[ \t]*(?P<kind>[^\n`]*)\n"
    r"(?P<code>.*?)(?:^[ \t]*(?P=fence)[`~]*[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)
"""A fenced block of Markdown: three or more backquotes or tildes, indented or not, with what it holds behind them."""
PYTHON = re.compile(r"(python|py|ipython|pycon)?[\d.]*", re.IGNORECASE)


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
    """The functions and classes that tests call and neither Python nor they themselves define, in order.

    >>> called("def near(a): return a\\nassert near(add(len('a'), Pair(1, 2))) == 3", "x")
    ('add', 'Pair')
    """
    import builtins

    try:
        tree = ast.parse(tests)
    except SyntaxError as error:
        raise DataError(f"{origin}: its tests are not Python: {error}.") from error
    calls = [
        one.func.id for one in ast.walk(tree) if isinstance(one, ast.Call) and isinstance(one.func, ast.Name)
    ]
    own = {one.name for one in ast.walk(tree) if isinstance(one, (ast.FunctionDef, ast.ClassDef))}
    own |= {one.id for one in ast.walk(tree) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}
    own |= {
        (alias.asname or alias.name).partition(".")[0]
        for one in ast.walk(tree)
        if isinstance(one, (ast.Import, ast.ImportFrom))
        for alias in one.names
    }
    return tuple(dict.fromkeys(name for name in calls if not hasattr(builtins, name) and name not in own))


def code_blocks(answer: str) -> list[str]:
    """The Python programs fenced in an answer, without the indentation of their fences, in order.

    >>> code_blocks("a\\n~~~python3\\nx = 1\\n~~~\\n- b\\n  ```py\\n  y = 2\\n  ```\\n```bash\\nls\\n```")
    ['x = 1\\n', 'y = 2\\n']
    """
    blocks = [
        re.sub(rf"^{found['indent']}", "", found["code"], flags=re.MULTILINE)
        for found in FENCE.finditer(answer)
        if PYTHON.fullmatch(found["kind"].strip().partition(" ")[0].strip("{}."))
    ]
    return [
        re.sub(r"^(>>>|\.\.\.) ?", "", one, flags=re.MULTILINE) if one.startswith(">>>") else one
        for one in blocks
    ]


def program(answer: str, one: Exercise) -> str:
    """The program in an answer: the last code block that defines a wanted name, else the last block, else the answer
    itself, behind what was begun unless it defines the name again. Of two programs the later is the one a model settled
    on.
    """
    blocks = code_blocks(answer)
    wanted = [re.compile(rf"^(?:async )?(?:def|class) {re.escape(n)}\b", re.M) for n in one.names]
    defines = [block for block in blocks if any(name.search(block) for name in wanted)]
    chosen = (defines or blocks or [answer])[-1]
    whole = defines or any(name.search(chosen) for name in wanted)
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
