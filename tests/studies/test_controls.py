"""A control replaces one gate and nothing else, whatever stands beside that gate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from selectkd.config import recipe_from
from selectkd.errors import ConfigError
from selectkd.evals.studies.arms import PLAIN, POSITION, RANDOM, SELECTED, SHUFFLE, arms, controlled
from selectkd.evals.studies.compare import differences
from selectkd.evals.studies.one_run import measured
from selectkd.evals.studies.study import Job, arms_of, check_names, values_of
from selectkd.objective.objective import Objective
from studies.test_study import load_study, study_of, written
from training.tiny import tiny_llama, write_pair

BOTH = {"verifier": {"name": "greedy_topk", "k": 2}, "selector": {"name": "tip", "share": 0.5}, "beta": 0.1}
CONTROLS = ["matched_random", "matched_position"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("controls")
    write_pair(root, tiny_llama(1, layers=3))
    return root


def test_a_control_of_a_verifier_beside_a_selector_keeps_the_selector(root: Path, tmp_path: Path) -> None:
    ours = {"method": "adaspec", "selection": {"verifier": "greedy_topk", "k": 2}}
    content = study_of(
        root,
        arms={"both": {"method": "kd", "selection": BOTH}, "of_method": ours},
        controls=CONTROLS,
        claims=[{"first": "both/matched_shuffle", "second": "both", "expected": "lower"}],
    )
    content["recipe"]["reference"] = {"model": content["recipe"]["teacher"]["model"]}
    study = load_study(written(tmp_path / "both.yaml", content))
    check_names(study)
    found = {arm.name: arm for arm in arms_of(study)}
    assert [name for name in found if "/" in name] == [
        f"{arm}/{control}" for arm in ("both", "of_method") for control in (SHUFFLE, POSITION)
    ]
    for arm in found.values():
        gated = recipe_from(study.values(arm.of, 1)).objective
        one = recipe_from(values_of(study, Job(arm, 1, None), None)).objective
        assert one.selector == gated.selector is not None and one.beta == gated.beta
        assert one.verifier == (
            gated.verifier if arm.control is None else {"name": arm.control, "of": gated.verifier}
        )


def test_a_shuffled_gate_accepts_as_many_of_the_tokens_that_a_selector_keeps(
    root: Path, tmp_path: Path
) -> None:
    """At a learning rate of nothing both train one student, so that their mean weights are equal: of the tokens kept as
    many are accepted, and the others count nothing in both."""
    content = study_of(root, arms={"both": {"method": "kd", "selection": BOTH}}, controls=CONTROLS)
    content["recipe"]["training"] |= {"learning_rate": 1e-12, "max_steps": 6}
    study = load_study(written(tmp_path / "rates.yaml", content))
    weights = {
        arm.name: measured(values_of(study, Job(arm, 1, None), None), tmp_path / "run")["mean_weight"]
        for arm in arms_of(study)
        if arm.control in (None, SHUFFLE)
    }
    assert weights["both/matched_shuffle"] == pytest.approx(weights["both"], rel=1e-6)
    assert 0.1 * 0.5 < weights["both"] < 0.5


@pytest.mark.parametrize(
    ("arm", "told"),
    [
        ({"objective": {"by_writer": {"student": {"beta": 0.5}}}}, r"by_writer.student sets beta"),
        ({"objective": {"by_writer": {"dataset": {"verifier": "spec_k", "selector": "tip"}}}},
         r"by_writer.dataset sets verifier and selector"),
        ({"objective": {"verifier": "always", "selector": "tip"}}, r"always beside the selector tip is none"),
    ],
)  # fmt: skip
def test_an_arm_whose_gate_no_control_can_replace_is_refused_controls(
    root: Path, tmp_path: Path, arm: dict[str, Any], told: str
) -> None:
    content = study_of(root, arms={"own": arm})
    assert [one.name for one in arms_of(load_study(written(tmp_path / "none.yaml", content)))] == ["own"]
    study = load_study(written(tmp_path / "own.yaml", {**content, "controls": CONTROLS}))
    with pytest.raises(ConfigError, match=rf"arms.own: .*{told}"):
        arms_of(study)


@pytest.mark.parametrize(
    ("method", "selection", "controls", "selector"),
    [
        ("kd", BOTH, [SHUFFLE, POSITION], "tip"),
        ("adaspec", {"verifier": "spec_k", "k": 2}, [SHUFFLE, POSITION], "adaspec"),
        ("adaspec", {"selector": "tip", "share": 0.2, "beta": 0.0}, [RANDOM], None),
        ("se_kd", {"verifier": "iw_opd", "beta": 0.0}, [SHUFFLE], "se_kd"),
    ],
)
def test_compare_controls_for_one_gate_and_keeps_the_selector_that_stands_beside_it(
    method: str, selection: dict[str, Any], controls: list[str], selector: str | None
) -> None:
    base = {
        "teacher": {"model": "t"}, "student": {"model": "s"}, "reference": {"model": "r"},
        "data": {"sources": [{"path": "x"}], "evaluation": 0.1},
        "training": {"output_dir": "o", "max_steps": 1, "batch_size": 1}, "selection": selection,
    }  # fmt: skip
    found = arms({"one": base}, [method], seeds=1, controls=True)
    assert [arm.selection for arm in found] == [PLAIN, SELECTED, *controls]
    selected = recipe_from(found[1].values).objective
    for arm in found[2:]:
        one = controlled(arm, {"acceptance": 0.3}) if arm.selection == RANDOM else arm
        objective = recipe_from(one.values).objective
        assert objective.beta == selected.beta
        assert (objective.selector or {}).get("name") == selector
        if arm.selection != RANDOM:
            assert objective.selector == selected.selector
            assert objective.verifier == {"name": arm.selection, "of": selected.verifier}
            Objective("forward_kl", objective.verifier)  # it can be made


def test_a_shuffled_control_is_compared_with_the_plain_and_the_selected_run() -> None:
    rows = [
        {"method": "kd", "selection": selection, "seed": 1, "held_out_kl_of": [kl, kl], "held_out_tokens_of": [3, 3]}
        for selection, kl in ((PLAIN, 1.0), (SELECTED, 2.0), (SHUFFLE, 1.5))
    ]  # fmt: skip
    found = {(one.first[1], one.second[1]): one.difference.value for one in differences(rows)}
    assert found == pytest.approx({(PLAIN, SELECTED): 1.0, (PLAIN, SHUFFLE): 0.5, (SHUFFLE, SELECTED): 0.5})
