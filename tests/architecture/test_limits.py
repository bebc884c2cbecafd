"""The size of functions: at most 60 lines and 8 parameters."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "src" / "selectkd"
LINES, PARAMETERS = 60, 8

LARGER = {
    # users call it: every option is a keyword of its own
    "loss/distillation.py distillation_loss": (LINES, 10),
    # users call it: a source's rules are keywords of their own
    "data/sources.py dataset_source": (LINES, 9),
    # a kernel's launch takes numbers and pointers one by one, and a row's sums share its registers
    "loss/block_triton/passes.py statistics": (81, 25),
    "loss/block_triton/passes.py gradient": (LINES, 19),
    # the Trainer's own three and our five beside model and arguments: who builds a trainer names each
    "training/trainer.py __init__": (LINES, 10),
}
"""(lines, parameters) of the functions that may be larger, each with its reason."""


def functions() -> Iterator[tuple[str, int, int]]:
    """(file and name, lines, parameters) of every function; self, cls and autograd's ctx are none."""
    for file in sorted(PACKAGE.rglob("*.py")):
        where = str(file.relative_to(PACKAGE))
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            given = node.args
            names = [*given.posonlyargs, *given.args, *given.kwonlyargs]
            if names and names[0].arg in ("self", "cls", "ctx"):
                names = names[1:]
            count = len(names) + (given.vararg is not None) + (given.kwarg is not None)
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if where.startswith("cli/") and any("typer.Option" in ast.unparse(one) for one in names):
                # a verb: its parameters are its options, one of several lines each
                count, lines = 0, (node.end_lineno or 0) - node.body[0].lineno + 1
            yield f"{where} {node.name}", lines, count


def test_a_function_has_at_most_sixty_lines_and_eight_parameters() -> None:
    wrong, larger = [], set()
    for name, lines, count in functions():
        most_lines, most = LARGER.get(name, (LINES, PARAMETERS))
        if lines > most_lines or count > most:
            wrong.append(f"{name}: {lines} lines, {count} parameters")
        if lines > LINES or count > PARAMETERS:
            larger.add(name)
    assert not wrong, "\n".join(wrong)
    assert set(LARGER) <= larger, "an exception that no function needs"
