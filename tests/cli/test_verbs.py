"""What is the same for every verb: its options, its help and where its answer goes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer

from selectkd.cli import main
from selectkd.cli.answer import JsonFile, write_answer
from selectkd.cli.app import ORDER, app
from selectkd.cli.terminal import be_quiet, say, show_error, show_progress
from selectkd.cli.verb import Verb

DOCS = Path(__file__).parents[2] / "docs"


def verbs(command: Any = None, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, command) of every verb, those of groups with the group's name before."""
    command = typer.main.get_command(app) if command is None else command
    for word, inner in getattr(command, "commands", {}).items():
        if hasattr(inner, "commands"):
            yield from verbs(inner, f"{name}{word} ")
        else:
            yield f"{name}{word}", inner


def options(command: Any) -> dict[str, Any]:
    return {name: one for one in command.params for name in one.opts if name.startswith("--")}


def test_every_verb_takes_debug_and_quiet_and_one_name_means_one_thing() -> None:
    wrong = []
    for name, command in verbs():
        found = options(command)
        wrong += [f"{name}: no {flag}" for flag in ("--debug", "--quiet") if flag not in found]
        wrong += [f"{name}: {flag}" for flag in found if flag.endswith("-env") and flag != "--api-key-env"]
        if "--json" in found and (found["--json"].metavar, found["--json"].name) != ("FILE|-", "json_file"):
            wrong.append(f"{name}: --json is something else")
        if "--device" in found and not found["--device"].metavar.startswith("auto|cpu|cuda"):
            wrong.append(f"{name}: --device {found['--device'].metavar}")
    assert not wrong, "\n".join(wrong)


PRIVATE = re.compile(
    r"\b(told|tells?|said|says?|seen|judged|gone on|goes on|house|room|book|crowd|ledger|looks?|wish|mine|"
    r"arms?|at the most|stands?|nobody|hear\w*)\b",
    re.I,
)
"""Words of the maintainers' own language."""


def help_texts() -> Iterator[tuple[str, str]]:
    """(whose, text) of every help text, of arguments and options too."""
    root = typer.main.get_command(app)
    groups = [(name, one) for name, one in root.commands.items() if hasattr(one, "commands")]  # type: ignore[attr-defined]
    for name, command in (("selectkd", root), *groups, *verbs()):
        yield name, f"{command.help}\n\n{command.epilog or ''}"
        yield from ((f"{name} {one.opts[0]}", getattr(one, "help", None) or "") for one in command.params)


def test_help_is_plain_english_in_short_sentences() -> None:
    wrong = []
    for whose, text in help_texts():
        if not text.strip():
            wrong.append(f"{whose}: no help")
        for paragraph in text.split("\n\n"):
            if not re.search(r"[.:]\S*$|^$", paragraph.strip()):
                wrong.append(f"{whose}: ends without a full stop: {paragraph!r}")
            for sentence in re.split(r"(?<=[.!?])\s+", paragraph):
                if len(sentence.split()) > 25 or PRIVATE.search(sentence):
                    wrong.append(f"{whose}: {sentence!r}")
    assert not wrong, "\n".join(wrong)


def noisy(json_file: JsonFile = None, tokens: Annotated[int, typer.Option()] = 3) -> None:
    print("a library prints")
    show_progress("half done")
    write_answer(json_file, {"tokens": tokens, "kl": float("inf")})
    say("a table for people")
    show_error("warning: something")


@pytest.fixture
def noisy_app() -> Any:
    own = typer.Typer(add_completion=False)
    own.command(cls=Verb)(noisy)
    return own


def test_json_dash_leaves_stdout_to_the_answer(
    noisy_app: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    be_quiet(False)
    noisy_app(["--json", "-"], standalone_mode=False)
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"tokens": 3, "kl": None}
    assert "a table for people" in printed.err and "a library prints" in printed.err
    noisy_app(["--json", str(tmp_path / "answer.json")], standalone_mode=False)
    printed = capsys.readouterr()
    assert json.loads((tmp_path / "answer.json").read_text("utf-8")) == {"tokens": 3, "kl": None}
    assert printed.out == "a library prints\na table for people\n"


def test_quiet_leaves_out_progress_alone(noisy_app: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet, lines in ((True, "warning: something\n"), (False, "half done\nwarning: something\n")):
        be_quiet(quiet)
        noisy_app([], standalone_mode=False)
        printed = capsys.readouterr()
        assert printed.err == lines and "a table for people" in printed.out
    assert main(["env", "--quiet"]) == 0 and "torch" in capsys.readouterr().out
    assert (
        main(["env", "--json", "no/such/folder/x.json"]) == 2
        and "a folder that exists" in capsys.readouterr().err
    )


def test_verbs_without_a_model_print_json_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faulty = tmp_path / "faulty.yaml"
    faulty.write_text("teacher: {}\n")
    for words, code in (
        ("show", 0),
        ("show methods", 0),
        ("show method kd", 0),
        ("show teachers", 0),
        ("env", 0),
        (f"doctor {faulty}", 2),
    ):
        assert main([*words.split(), "--json", "-"]) == code
        assert json.loads(capsys.readouterr().out)


def test_a_newcomer_sees_the_verbs_in_the_order_of_a_project_each_in_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    inner = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    for group, expected in (
        ("", ORDER),
        *((name, inner[name].commands) for name in ("data", "cache", "teacher", "study")),
    ):
        assert main([*group.split(), "--help"]) == 0
        lines = capsys.readouterr().out.partition(" Commands ")[2].splitlines()
        assert [line[1:].partition("  ")[0].strip() for line in lines if line.startswith("│")] == [*expected]


def test_the_verbs_of_research_stand_in_a_group_and_are_found_by_their_old_names() -> None:
    verb = dict(verbs())
    for name in ("compare", "panel", "dynamics", "landscape", "speculate"):
        assert verb[name].hidden and not verb[f"study {name}"].hidden
        assert verb[name].callback.__wrapped__ is verb[f"study {name}"].callback.__wrapped__


def test_the_version_is_a_verb_and_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == main(["--version"]) == 0 and capsys.readouterr().out == "0.1.0\n0.1.0\n"


def test_the_page_of_commands_is_the_command_line_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "commands", "--markdown"]) == 0
    assert (DOCS / "cli.md").read_text("utf-8") == capsys.readouterr().out, "make pages"
    assert main(["show", "commands", "--json", "-"]) == 0
    listed = {row["name"] for row in json.loads(capsys.readouterr().out)["commands"]}
    assert listed == {name for name, command in verbs() if not command.hidden}
    assert main(["show", "methods", "--markdown"]) == 2 and "show commands" in capsys.readouterr().err
