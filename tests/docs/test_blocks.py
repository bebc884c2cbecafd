"""Every block of code of README and docs: Python runs, and what cannot run here names what is there; JSON is JSON."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet

from selectkd.data.detection import FORMATS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "py", "text", "json", "yaml"}
"""python runs; py and text are of programs that need a hub or packages that are not here; YAML is of test_named."""
PROGRAMS = {"selectkd", "make", "python", "pip", "ollama", "mlx_lm.convert", "vllm"}
ELSEWHERE = {"hosts.md": "tests/adapters/test_hosts.py", "README.md": "tests/docs/test_readme.py"}
"""Pages whose Python another test runs."""


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    found = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)
    return [code for language, code in found if not languages or language in languages]


def resolved(dotted: str) -> Any:
    """What a dotted name of ours stands for; None where its own package is not here. AssertionError where there is
    nothing.
    """
    parts = dotted.split(".")
    module = next(".".join(parts[:cut]) for cut in range(len(parts), 0, -1) if spec_of(".".join(parts[:cut])))
    try:
        if module.startswith("selectkd.adapters."):
            raise ImportError("its host takes seconds to import")
        found = importlib.import_module(module)
        for name in parts[module.count(".") + 1 :]:
            found = getattr(found, name)
    except ImportError:
        source = Path(str(getattr(spec_of(module), "origin", ""))).read_text("utf-8")
        missing = [name for name in parts[module.count(".") + 1 :] if not re.search(rf"\b{name}\b", source)]
        assert not missing, dotted
        return None
    except AttributeError as error:
        raise AssertionError(dotted) from error
    return found


def spec_of(module: str) -> Any:
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(module)
    return None


def names_of(tree: ast.AST) -> dict[str, Any]:
    """What the imports of selectkd in a program bring, by name."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "selectkd":
            for one in node.names:
                found[one.asname or one.name] = resolved(f"{node.module}.{one.name}")
        elif isinstance(node, ast.Import):
            found |= {one.name: resolved(one.name) for one in node.names if one.name.startswith("selectkd.")}
    return found


def check_call(called: Any, keywords: list[str]) -> None:
    """AssertionError for a keyword that ``called`` does not take."""
    if called is None:
        return
    taken = inspect.signature(called).parameters
    if not any(one.kind is one.VAR_KEYWORD for one in taken.values()):
        assert set(keywords) <= set(taken), f"{called}: {set(keywords) - set(taken)}"


def check_python(code: str) -> None:
    tree = ast.parse(code)
    names = names_of(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            check_call(names[node.func.id], [one.arg for one in node.keywords if one.arg])


def components(content: Any) -> Iterator[tuple[str, list[str]]]:
    """(dotted name, keywords) of each component that another tool's recipe makes of ours."""
    if isinstance(content, list):
        for one in content:
            yield from components(one)
    elif isinstance(content, dict):
        for key in ("_target_", "_component_"):
            if str(content.get(key, "")).startswith("selectkd."):
                yield content[key], [one for one in content if one != key]
        for one in content.values():
            yield from components(one)


def check_text(code: str) -> None:
    """A block of another tool: Python, a recipe, or a command of its own; of ours in it every name is there."""
    for dotted in re.findall(r"\bselectkd(?:\.\w+)+", code):
        resolved(dotted)
    try:
        ast.parse(code)
    except SyntaxError:
        content = yaml.safe_load(code) if not code.startswith("swift ") else None
        assert content is None or isinstance(content, dict), code
        for dotted, keywords in components(content):
            check_call(resolved(dotted), keywords)
    else:
        check_python(code)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_names_what_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    assert set(re.findall(r"^```(\w+)", text, re.M)) <= LANGUAGES
    assert len(re.findall(r"^```", text, re.M)) == 2 * len(blocks(page)), "each block has its end"
    for code in blocks(page, "python", "py"):
        check_python(code)
    for code in blocks(page, "text"):
        check_text(code)
    for line in "".join(blocks(page, "json")).splitlines():
        assert isinstance(json.loads(line), dict) and set(json.loads(line)) <= {"messages"}, FORMATS


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in ELSEWHERE], ids=name_of)
def test_every_block_of_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        exec(compile(code, name_of(page), "exec"), {"__name__": "page"})


def requirements() -> dict[str, set[str]]:
    """The versions that pyproject.toml asks for, by package; of an extra's name, the empty one."""
    project = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project]")[2].partition("[tool.")[0]
    found = {f"[{extra}]": {""} for extra in re.findall(r"^(\w+) = \[", project, re.M)}
    for text in re.findall(r'"([a-z][^"]*)"', project):
        with contextlib.suppress(InvalidRequirement):
            one = Requirement(text)
            found.setdefault(one.name, set()).add(str(one.specifier))
    return found


def lines_of(page: Path) -> list[str]:
    """The lines of a page's indented blocks, and its inline code."""
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    inline = [" ".join(one.split()) for one in re.findall(r"`([^`]+)`", text)]
    return [*re.findall(r"^ {4}(?![-*] )(\S.*)$", text, re.M), *inline]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_is_of_a_known_program_and_pip_installs_what_the_project_names(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.S)
    for line in re.findall(r"^ {4}(?![-*] )(\S.*)$", text, re.M):
        program = re.match(r"(?:[A-Z_]+=\S+ )*([\w.-]+)(?= [\w'./-])", line)
        assert program is None or program[1] in PROGRAMS, line
    known = requirements()
    for line in lines_of(page):
        if not line.startswith("pip install "):
            continue
        for word in shlex.split(line, comments=True)[2:]:
            if word.startswith("-") or "://" in word:
                continue
            one = Requirement(word.replace(".", "selectkd", 1) if word.startswith(".") else word)
            assert one.name != "selectkd" or {f"[{extra}]" for extra in one.extras} <= set(known), word
            if one.name in known and str(one.specifier):
                named = str(one.specifier)
                fits = [
                    named == ours or (named.startswith("==") and SpecifierSet(ours).contains(named[2:]))
                    for ours in known[one.name]
                ]
                assert all(fits), f"{word}, but pyproject.toml: {known[one.name]}"
