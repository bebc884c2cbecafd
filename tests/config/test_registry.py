"""Names to components."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from selectkd.errors import ConfigError
from selectkd.objective import plugins
from selectkd.objective.registry import bind, build, lookup, name_of, parameters


def near(logp: float, logq: float, *, alpha: float = 0.1, exact: bool = False) -> float:
    return (logp - logq) * alpha


@dataclass(frozen=True)
class gate:
    k: int = 5
    share: float | None = None

    def __call__(self) -> int:
        return self.k


TABLE: dict[str, Callable] = {"near": near, "gate": gate}


def test_a_bare_name_is_the_function_itself() -> None:
    assert bind(TABLE, "near", kind="divergence") is near


def test_parameters_are_bound_and_the_name_is_kept() -> None:
    bound = bind(TABLE, {"name": "near", "alpha": 2}, kind="divergence")
    assert bound(3.0, 1.0) == 4.0 and name_of(bound) == "near"


def test_a_factory_is_called_with_its_parameters() -> None:
    assert build(TABLE, {"name": "gate", "k": 3}, kind="verifier") == gate(k=3)


def test_a_callable_and_an_instance_pass_through() -> None:
    instance = gate(2)
    assert (
        bind(TABLE, near, kind="divergence") is near and build(TABLE, instance, kind="verifier") is instance
    )


def test_a_class_is_made_with_its_defaults() -> None:
    assert build(TABLE, gate, kind="verifier") == gate()


def test_the_tensors_are_no_parameters() -> None:
    assert list(parameters(near)) == ["alpha", "exact"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("naer", "Did you mean 'near'?"),
        ({"name": "near", "alhpa": 1}, "Did you mean 'alpha'?"),
        ({"name": "near", "logp": 1}, "no parameter 'logp'"),
        ({"name": "near", "alpha": "big"}, "alpha = 'big' must be a number"),
        ({"name": "near", "exact": 1}, "must be true or false"),
        ({"name": "gate", "k": 2.5}, "must be an integer"),
        ({"name": "gate", "k": True}, "must be an integer"),
        ({"name": "gate", "share": "x"}, "must be a number or null"),
        ({"alpha": 1}, "needs a name"),
        ({"name": "near", 3: 1}, "no parameter 3"),
        ({"name": "no_such_package.mod:fn"}, "cannot be imported"),
        ("math:no_such_thing", "cannot be imported"),
        (":", "is no name"),
        ("math:pi", "does not declare itself"),
        ("cmath:exp", "not allowed"),
        (7, "must be a name"),
    ],
)
def test_what_cannot_be_a_component_is_refused_in_words(
    spec: object, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugins, "_allowed", {"math": None, "no_such_package": None})
    with pytest.raises(ConfigError) as caught:
        bind(TABLE, spec, kind="divergence")  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_a_parameter_without_a_default_is_asked_for() -> None:
    with pytest.raises(ConfigError, match="needs bound"):
        lookup({"clip": lambda logp, logq, bound: logp}, "clip", kind="divergence")


def test_a_component_from_outside_needs_no_file_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outside_losses.py").write_text(
        "from selectkd import component\n@component('divergence')\n"
        "def twice(logp, logq, *, by: float = 2.0):\n    return by * (logp - logq)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "_allowed", {"outside_losses": None})
    bound = bind(TABLE, {"name": "outside_losses:twice", "by": 3.0}, kind="divergence")
    assert bound(2.0, 1.0) == 3.0
    with pytest.raises(ConfigError, match="It takes: by"):
        bind(TABLE, {"name": "outside_losses:twice", "bye": 3.0}, kind="divergence")
    sys.modules.pop("outside_losses", None)
