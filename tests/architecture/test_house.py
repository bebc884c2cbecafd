"""The house rules that a program can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "selectkd"
FILES = sorted(PACKAGE.rglob("*.py"))
GUARDED = {"plugins.py", "registry.py", "by_device.py", "launch.py", "block_compiled.py"}
"""Files beside the mathematics that load or compile, and say what was wrong where that fails."""
MATHEMATICS = [
    file for room in ("objective", "loss") for file in FILES
    if file.is_relative_to(PACKAGE / room) and file.name not in GUARDED
]  # fmt: skip


def trees(files: list[Path]) -> list[tuple[str, ast.Module]]:
    return [(str(file.relative_to(ROOT)), ast.parse(file.read_text())) for file in files]


def test_the_root_holds_packages_and_three_files_alone() -> None:
    assert {file.name for file in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}


def test_imports_keep_to_the_layers() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    ran = subprocess.run([str(lint)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_file_has_one_subject_and_four_hundred_lines_at_most(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400
    assert file.stem not in {"utils", "helpers", "common", "misc", "manager"}
    assert ast.get_docstring(ast.parse(file.read_text())), "a file says what its subject is"


CELL = PACKAGE / "evals" / "sandbox" / "cell.py"
"""What runs a model's program: a process of its own, locked in, that must survive whatever the program raises."""


LOGGERS = PACKAGE / "training" / "loggers.py"
"""What calls other people's loggers, whose errors are told and must not end a run."""


def test_no_error_is_swallowed() -> None:
    for name, tree in trees([file for file in FILES if file not in (CELL, LOGGERS)]):
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = ast.unparse(node.type) if node.type is not None else ""
                broad = caught in ("", "Exception", "BaseException")
                assert not broad or isinstance(node.body[-1], ast.Raise), f"{name}:{node.lineno}"


def test_nothing_runs_foreign_code_or_pickles() -> None:
    forbidden = {
        "eval",
        "exec",
        "torch.load",
        "pickle.load",
        "pickle.loads",
        "os.system",
        "joblib.load",
        "yaml.load",
    }
    for name, tree in trees([file for file in FILES if file != CELL]):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                where = f"{name}:{node.lineno}"
                assert ast.unparse(node.func) not in forbidden, where
                assert ast.unparse(node.func).rpartition(".")[2] not in ("extractall", "unsafe_load"), where
                for keyword in node.keywords:
                    if keyword.arg in ("shell", "trust_remote_code", "allow_pickle"):
                        assert ast.unparse(keyword.value) == "False", where
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"pickle", "marshal", "shelve"}, name


def test_only_the_command_line_and_the_demo_print() -> None:
    for name, tree in trees([file for file in FILES if "cli" not in file.parts and "demo" not in str(file)]):
        for node in ast.walk(tree):
            assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"), (
                f"{name}:{node.lineno}"
            )


def test_the_mathematics_imports_torch_and_nothing_else_that_is_installed() -> None:
    allowed = set(sys.stdlib_module_names) | {
        "torch",
        "triton",
        "selectkd",
        "jaxtyping",
        "typing_extensions",
    }  # jaxtyping: shapes in signatures; typing_extensions: torch brings it
    for name, tree in trees(MATHEMATICS):
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {one.partition(".")[0] for one in names} <= allowed, name


def test_the_mathematics_catches_nothing() -> None:
    for name, tree in trees(MATHEMATICS):
        assert not [node for node in ast.walk(tree) if isinstance(node, ast.Try)], name


@pytest.mark.parametrize(
    "module",
    ["selectkd", "selectkd.config", "selectkd.errors", "selectkd.objective.registry", "selectkd.cli"],
)
def test_these_import_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there() -> None:
    import selectkd

    for name in selectkd.__all__:
        assert getattr(selectkd, name) is not None, name


def test_the_repository_names_no_machine() -> None:
    tracked = [
        *(file for file in ROOT.glob("*.*") if file.name != ".git"),
        *ROOT.glob("recipes/*"),
        *ROOT.glob("docs/*"),
        *FILES,
        ROOT / "Makefile",
    ]
    for file in tracked:
        if file.is_file():
            told = file.read_text(errors="replace")
            found = re.search(r"(?<![\w.])/(work|home|root|tmp/dev)/", told)
            assert found is None, f"{file.name}: {found and found.group()}"


def test_every_pinned_version_is_exact() -> None:
    lines = (ROOT / "constraints" / "pinned.txt").read_text().splitlines()
    rows = [row for row in lines if not row.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9.]+( ; .+)?", row) for row in rows)
    assert "torch==2.13.0" in rows
