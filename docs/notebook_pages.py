"""A hook of MkDocs: each notebook as a page of the site, its cells as code and what they showed when it was last run.

The notebooks hold their outputs (`make notebooks` writes them), so building the site runs nothing.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mkdocs.structure.files import File, Files

LINK = re.compile(r"(\]\([^)\s:]*)\.ipynb(?=[)#])(?!\)\{)")
"""The end of a link's path to a notebook, but of one that carries attributes."""


def on_files(files: Files, config: Any) -> Files:
    """Adds a page beside each notebook; the notebook itself stays, to be downloaded."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = notebook.src_uri.removesuffix("ipynb") + "md"
        files.append(
            File.generated(config, page, content=as_markdown(notebook.name, notebook.content_string))
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a notebook, which is a file of the repository, leads to its page."""
    return LINK.sub(r"\1.md", markdown)


def as_markdown(name: str, notebook: str) -> str:
    """A notebook as a page of Markdown: text as it is, code in blocks, and the outputs of each cell below it.

    >>> print(as_markdown("n", '{"cells": [{"cell_type": "code", "source": ["1"], "outputs": []}]}').strip())
    ```python
    1
    ```
    <BLANKLINE>
    [The notebook itself](n.ipynb){ download="n.ipynb" }
    """
    parts: list[str] = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced(source, "python"))
        parts += [_shown(one) for one in cell.get("outputs", ())]
    return "\n\n".join([*parts, f'[The notebook itself]({name}.ipynb){{ download="{name}.ipynb" }}', ""])


def _shown(output: dict[str, Any]) -> str:
    if output["output_type"] == "stream":
        block = _fenced("".join(output["text"]).rstrip(), "text")
        return f'<div class="cell-output" markdown="1">\n\n{block}\n\n</div>'
    data = {kind: "".join(value) for kind, value in output["data"].items()}
    if "image/png" in data:
        picture = "".join(data["image/png"].split())
        source = f"data:image/png;base64,{picture}"
        return f'<div class="cell-output"><img alt="Figure that the cell above draws" src="{source}"></div>'
    html = data["text/html"].replace("\n", "&#10;")  # a line without letters would end a block of HTML
    return f'<div class="cell-output">{html}</div>'


def _fenced(text: str, language: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"
