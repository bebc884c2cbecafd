"""Runs the notebooks of docs/ from top to bottom and writes what their cells show into them: `make notebooks`.

    python benchmarks/notebooks.py

They run in a folder of their own, one after the other, in this process; no kernel is needed. The site and GitHub show
the outputs. A test compares the hash of the sources that the notebook notes with its cells.
"""

from __future__ import annotations

import argparse
import ast
import base64
import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
ORDER = ("first_distillation", "what_gates_keep")
"""The second finds the first one's teacher where the demo's is not installed."""


def sources_hash(notebook: Mapping[str, Any]) -> str:
    """Of the code of all cells."""
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()[:16]


def executed(
    notebook: Mapping[str, Any], names: dict[str, Any], **changed: str
) -> Iterator[tuple[Any, str, Any]]:
    """(cell, what it printed, the value of its last expression) of each code cell, run in ``names``.

    changed: name -> value that its assignment gets in place of the notebook's.
    """
    names["__name__"] = "__main__"
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        title = f"cell {cell['id']}"
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if isinstance(body[-1], ast.Expr) else None
        printed, value = io.StringIO(), None
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(body, []), title, "exec"), names)
            names.update({key: value for key, value in changed.items() if key in names})
            if last is not None:
                value = eval(compile(ast.Expression(last.value), title, "eval"), names)
        yield cell, printed.getvalue(), value


def outputs(printed: str, value: Any, count: int) -> list[dict[str, Any]]:
    """What a cell shows, as a notebook holds it."""
    found: list[dict[str, Any]] = []
    if printed:
        found.append({"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)})
    if type(value).__name__ == "Figure":
        file = io.BytesIO()
        value.savefig(file, dpi=80, metadata={"Software": None})
        data = {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": ["<Figure>"]}
    elif hasattr(value, "_repr_html_"):
        data = {"text/html": value._repr_html_().splitlines(keepends=True), "text/plain": ["<Picture>"]}
    else:
        return found
    return [*found, {"output_type": "execute_result", "data": data, "metadata": {}, "execution_count": count}]


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    import matplotlib.pyplot as plt

    plt.switch_backend("agg")
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for name in ORDER:
            path = FOLDER / f"{name}.ipynb"
            notebook = json.loads(path.read_text("utf-8"))
            for count, (cell, printed, value) in enumerate(executed(notebook, {}), 1):
                cell["execution_count"], cell["outputs"] = count, outputs(printed, value, count)
            notebook["metadata"]["selectkd"] = {"outputs_of": sources_hash(notebook)}
            path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
            print(f"{name}: {path.stat().st_size / 1000:.0f} kB")
        os.chdir(FOLDER)


if __name__ == "__main__":
    main()
