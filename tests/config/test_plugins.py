"""A recipe runs no code but that of modules the user allowed, and there only what says it is a component."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from selectkd.cli import main
from selectkd.errors import ConfigError
from selectkd.objective import plugins
from selectkd.objective.plugins import allow_plugin, component, grant, granted, load, search
from training.tiny import recipe_of, tiny_llama, write_pair

OWN = '''
from os import system
from subprocess import Popen, run
import os
from selectkd import component

@component("verifier")
class sure:
    """a = 1 where the teacher is sure."""
    def __init__(self, least: float = 0.5):
        self.least = least
    def __call__(self, pair, uniform):
        return (pair.logp.amax(-1).exp() > self.least).to(pair.logp.dtype)

@component("divergence")
def squared(logp, logq, *, scale: float = 1.0):
    return scale * (logp.exp() - logq.exp()).square().sum(-1)

def undeclared(logp, logq):
    return (logp.exp() - logq.exp()).square().sum(-1)
'''


@pytest.fixture(autouse=True)
def nothing_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(plugins, "_allowed", {})
    monkeypatch.setattr(plugins, "_places", {})
    yield
    for name in ("own_parts", "own_partsevil", "evil"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def root(tmp_path_factory: Any) -> Path:
    """A pair, and beside its recipes a module of the user's and two that leave a witness when they are imported."""
    root = tmp_path_factory.mktemp("plugins")
    write_pair(root, tiny_llama(1, layers=1))
    (root / "own_parts.py").write_text(OWN, "utf-8")
    evil = f"open({str(root / 'witness')!r}, 'w').close()\ndef run(*a, **k): return 1\n"
    for name in ("evil", "own_partsevil", "bitsandbytes", "wandb", "flash_attn"):
        (root / f"{name}.py").write_text(evil, "utf-8")
    return root


def written(root: Path, sections: dict[str, Any]) -> Path:
    content = recipe_of(root, training={"output_dir": str(root / "run"), "max_steps": 1, "batch_size": 2})
    for key, value in sections.items():
        *above, last = key.split("/")
        here: Any = content
        for step in above:
            here = here[int(step)] if isinstance(here, list) else here.setdefault(step, {})
        here[last] = value
    path = root / "recipe.yaml"
    path.write_text(json.dumps(content), "utf-8")
    return path


POPEN = {"name": "subprocess:Popen", "args": ["touch", "WITNESS"]}
ESCAPES: dict[str, dict[str, Any]] = {
    "a command as verifier": {"objective/verifier": POPEN},
    "a command as divergence": {"objective/divergence": {"name": "os:system", "command": "touch WITNESS"}},
    "a command as selector": {"objective/selector": POPEN},
    "a command as extra": {"objective/extras": [POPEN]},
    "a command as selection": {"selection": {"verifier": POPEN}},
    "a command as selection's name": {"selection": {"verifier": "evil:run"}},
    "a command as selection's selector": {"selection": {"selector": "evil:run"}},
    "a command as method": {"method": "evil:run"},
    "a command as method with options": {"method": POPEN},
    "of one writer": {"objective/by_writer": {"dataset": {"divergence": "evil:run"}}},
    "a verifier of one writer": {"objective/by_writer": {"dataset": {"verifier": POPEN}}},
    "of one source": {"data/sources/0/objective": {"verifier": POPEN}},
    "a divergence of one source": {"data/sources/0/objective": {"divergence": "evil:run"}},
    "a policy": {"data/policy": {"name": "evil:run"}},
    "an optimizer": {"training/optimizer": "evil:run"},
    "a logger": {"training/report_to": ["evil:run"]},
    "a module that a logger's name loads": {"training/report_to": ["wandb"]},
    "a module that an optimizer loads": {"training/optimizer": "adamw_8bit"},
    "a module that attention loads": {"student/attn_implementation": "flash_attention_2"},
    "a kernel of the hub": {"student/attn_implementation": "org/kernel"},
    "a teacher's kernel": {"teacher/attn_implementation": "org/kernel:evil"},
    "a format": {"data/sources/0/format": "evil:run"},
    "a script of a data set": {"data/sources/0/path": "ROOT/evil.py"},
    "builtins": {"objective/divergence": {"name": "builtins:exec", "logp": "1"}},
    "our own command line": {"objective/verifier": {"name": "selectkd.cli:main", "arguments": ["demo"]}},
    "spaces around a name": {"objective/verifier": {"name": " subprocess :Popen", "args": ["true"]}},
    "a path for a name": {"objective/verifier": "ROOT/evil:run"},
    "a name above": {"objective/verifier": "..evil:run"},
    "letters that look the same": {"objective/verifier": "\uff45vil:run"},
    "two colons": {"objective/verifier": "evil:run:run"},
}  # fmt: skip
WITH_OWN = {
    "what an allowed module imported": {"objective/verifier": {**POPEN, "name": "own_parts:Popen"}},
    "a function it imported": {"objective/divergence": {"name": "own_parts:system", "command": "touch WITNESS"}},
    "a module it imported": {"objective/divergence": {"name": "own_parts:os.system", "command": "touch WITNESS"}},
    "its builtins": {"objective/divergence": "own_parts:__builtins__"},
    "what it did not declare": {"objective/divergence": "own_parts:undeclared"},
    "what it declared as something else": {"objective/divergence": "own_parts:sure"},
    "a module whose name begins alike": {"objective/divergence": "own_partsevil:run"},
    "a module below it that is none": {"objective/divergence": "own_parts.evil:run"},
    "another module beside it": {"objective/divergence": "evil:run"},
}  # fmt: skip


@pytest.mark.parametrize("what", [*ESCAPES, *WITH_OWN])
def test_a_recipe_runs_nothing_that_the_user_did_not_allow(
    what: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = json.dumps((ESCAPES | WITH_OWN)[what])
    sections = json.loads(text.replace("WITNESS", str(root / "witness")).replace("ROOT", str(root)))
    allowed = ["--allow-plugin", "own_parts"] if what in WITH_OWN else []
    code = main(["doctor", str(written(root, sections)), "--json", "-", *allowed])
    assert not (root / "witness").exists() and "evil" not in sys.modules
    told = json.loads(capsys.readouterr().out)
    assert code in (2, 3) and any(not row["ok"] for row in told), told


@pytest.mark.parametrize("verb", ["train {}", "study panel {}", "estimate {}", "generate {} --out x.jsonl"])
def test_every_verb_refuses_a_module_that_is_not_allowed_and_names_the_option(
    verb: str, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    recipe = written(root, {"objective/verifier": {"name": "subprocess:Popen", "args": ["touch", "witness"]}})
    code = main(verb.format(recipe).split())
    assert not (root / "witness").exists()
    if not verb.startswith("estimate"):  # which needs no objective
        assert code == 2 and "--allow-plugin subprocess" in capsys.readouterr().err


def test_a_module_beside_the_recipe_works_once_it_is_allowed(root: Path, capsys: Any) -> None:
    parts = {"verifier": {"name": "own_parts:sure", "least": 0.1}, "divergence": "own_parts:squared"}
    recipe = written(root, {"objective": parts})
    assert main(["doctor", str(recipe)]) == 2 and "--allow-plugin own_parts" in capsys.readouterr().out
    assert main(["doctor", str(recipe), "--allow-plugin", "own_parts"]) == 0
    assert str(root) not in sys.path


def test_what_is_allowed_reaches_the_process_of_an_arm(root: Path) -> None:
    allow_plugin("own_parts")
    search(root)
    given = granted()
    plugins._allowed.clear()
    plugins._places.clear()
    with pytest.raises(ConfigError, match="not allowed"):
        load("own_parts:squared", "divergence")
    grant(given)
    assert load("own_parts:squared", "divergence").__name__ == "squared"


def test_an_installed_package_may_allow_its_module_by_an_entry_point(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_parts.py").write_text(OWN, "utf-8")
    info = tmp_path / "own_parts-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: own-parts\nVersion: 1.0\n", "utf-8")
    (info / "entry_points.txt").write_text("[selectkd.plugins]\nparts = own_parts\n", "utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load("own_parts:squared", "divergence").__name__ == "squared"
    with pytest.raises(ConfigError, match="does not declare itself"):
        load("own_parts:Popen", "verifier or selector")


@pytest.mark.parametrize("name", ["", "a b", "../evil", "evil.py/", "-c", "os;x", "a..b"])
def test_only_a_module_can_be_allowed(name: str) -> None:
    with pytest.raises(ConfigError, match="is no module"):
        allow_plugin(name)


def test_a_component_is_of_a_kind_we_have() -> None:
    with pytest.raises(ConfigError, match="divergence, verifier, selector, extra"):
        component("teacher")
