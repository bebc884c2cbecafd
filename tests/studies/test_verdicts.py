"""What results say of a study: claims, trends, columns, comparisons, power, and how near to a plateau it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from selectkd.cli.app import main
from selectkd.config.study import Claim, load_study
from selectkd.errors import ConfigError
from selectkd.evals.statistics import t_interval
from selectkd.evals.studies.results import Compared, detectable, last_fall, markdown, slope, verdict
from selectkd.evals.studies.rows import append_row, read_rows
from selectkd.evals.studies.study import chosen_rates
from studies.test_study import study_of, written
from training.tiny import tiny_llama, write_pair


@pytest.mark.parametrize(
    ("expected", "within", "values", "outcome"),
    [
        ("lower", None, [-1.0, -1.1, -0.9], "confirmed"),
        ("lower", None, [1.0, 1.1, 0.9], "refuted"),
        ("lower", None, [-1.0, 1.1, 0.0], "undecided"),
        ("higher", None, [1.0, 1.1, 0.9], "confirmed"),
        ("same", 0.5, [0.01, -0.02, 0.0], "confirmed"),
        ("same", 0.5, [1.0, 1.1, 0.9], "refuted"),
        ("same", 0.5, [1.0, 0.0, 0.5], "undecided"),
        ("same", 0.5, [0.1], "not run"),
    ],
)
def test_a_claim_is_decided_by_where_the_whole_interval_lies(
    expected: Any, within: float | None, values: list[float], outcome: str
) -> None:
    claim = Claim(first="a", second="b", expected=expected, within=within)
    assert (
        verdict(claim, Compared("a", "b", "held_out_kl", t_interval(values), detectable(values))) == outcome
    )


def test_a_trend_is_the_slope_with_each_doubling_in_every_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    arms = {f"of_{size}": {"method": "kd"} for size in (1, 2, 8)}
    trend = {"of": {"of_1": 1, "of_2": 2, "of_8": 8}, "measure": "tar"}
    content = study_of(tmp_path, arms=arms, seeds=[1, 2, 3], trends=[trend])
    file = written(tmp_path / "t.yaml", content)
    study, rows = load_study(file), {}
    for seed, steep in ((1, 0.1), (2, 0.2), (3, 0.3)):
        for arm, doublings in (("of_1", 0), ("of_2", 1), ("of_8", 3)):
            row = {"arm": arm, "seed": seed, "learning_rate": None, "tar": 0.4 + steep * doublings,
                   "held_out_kl": 1.0, "wall_seconds": 1.0}  # fmt: skip
            append_row(tmp_path / "t.jsonl", row)
    rows = read_rows(tmp_path / "t.jsonl")
    seen = slope(study, rows, study.trends[0])
    wanted = t_interval([0.1, 0.2, 0.3])
    assert seen is not None
    assert (seen.value, seen.low, seen.n) == (pytest.approx(0.2), pytest.approx(wanted.low), 3)
    assert main(["study", "results", str(file)]) == 0
    assert "TAR with each doubling from of_1 to of_8: +0.2000 [" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"'of_9', which is none"):
        load_study(written(tmp_path / "w.yaml", {**content, "trends": [{"of": {"of_1": 1, "of_9": 9}}]}))


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_the_share_of_python_has_a_column_where_a_student_wrote_any(tmp_path: Path, share: float) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    study = load_study(written(tmp_path / "python.yaml", study_of(tmp_path)))
    row = {"held_out_kl": 0.5, "tar": 0.0, "parse_rate": 0.0}
    rows = {("kd", 1, None): row, ("gated", 1, None): {**row, "parse_rate": share}}
    text = markdown("python", study, rows, command="a command")
    assert ("parse rate" in text) == bool(share) and "| TAR |" in text


def test_an_arm_is_compared_with_the_one_that_differs_by_its_gate_and_shared_warnings_are_shown(
    tmp_path: Path,
) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    gate = {"selection": {"verifier": "greedy_topk", "k": 5, "beta": 0.01}}
    arms = {"kd": {"method": "kd"}, "seqkd": {"method": "seqkd"}}
    arms |= {f"{name}_gated": {"method": name, **gate} for name in ("kd", "seqkd")}
    study = load_study(written(tmp_path / "two.yaml", study_of(tmp_path, arms=arms)))
    row = {"held_out_kl": 0.5, "curve": [[0, 1.0, 0.5], [5, 0.8, 0.5], [10, 0.6, 0.5]]}
    rows = {
        (name, 1, None): {**row, "warnings": ["all texts alike", f"of {name} alone"]} for name in study.arms
    }
    text = markdown("two", study, rows, command="a command")
    compared = [line for line in text.splitlines() if "→" in line]
    assert [line.split(":")[0] for line in compared] == [
        "- kd → seqkd", "- kd → kd_gated", "- seqkd → seqkd_gated",
    ]  # fmt: skip
    assert "Every run warned: all texts alike" in text and "alone" not in text
    assert "Over the last 50% of a run's steps held-out KL still fell by 25.0%" in text
    assert "none was tuned" in text


@pytest.mark.parametrize(
    ("tuned_by", "rate"), [(None, 0.01), ("overlap", 0.02), ("draft_acceptance", 0.01), ("held_out_kl", 0.04)]
)
def test_learning_rates_are_chosen_by_another_number_than_the_outcome_where_the_study_says_so(
    tmp_path: Path, tuned_by: str | None, rate: float
) -> None:
    write_pair(tmp_path, tiny_llama(1, layers=3))
    content = study_of(
        tmp_path, arms={"kd": {"method": "kd"}}, outcome="draft_acceptance", measures=["draft"],
        learning_rates=[0.01, 0.02, 0.04], **({} if tuned_by is None else {"tuned_by": tuned_by}),
    )  # fmt: skip
    study = load_study(written(tmp_path / "s.yaml", content))
    tried = {0.01: (0.9, 0.5, 0.7), 0.02: (0.8, 0.8, 0.6), 0.04: (0.7, 0.6, 0.5)}
    rows: dict[Any, Any] = {
        ("kd", 0, one): {"draft_acceptance": acceptance, "overlap": overlap, "held_out_kl": kl}
        for one, (acceptance, overlap, kl) in tried.items()
    }
    assert chosen_rates(study, rows) == {"kd": rate}
    words = {None: "draft acceptance", "held_out_kl": "held-out KL"}.get(
        tuned_by, str(tuned_by).replace("_", " ")
    )
    assert f"that is best by {words} on seed 0" in markdown("s", study, rows, command="c")


def test_the_detectable_difference_is_found_four_times_in_five() -> None:
    """By the exact power of the t test, for 5 and 10 seeds; the approximation is within .02."""
    for n in (5, 10):
        values = np.random.default_rng(0).normal(size=n)
        shift = detectable(values.tolist()) / values.std(ddof=1) * np.sqrt(n)
        critical = stats.t.ppf(0.975, n - 1)
        power = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        assert power == pytest.approx(0.8, abs=0.02)


def test_the_last_fifth_of_a_curve_says_how_near_a_run_came_to_its_plateau() -> None:
    curve = [[step, 1.0 / (1 + step), 0.5] for step in range(0, 101, 10)]
    assert last_fall({"curve": curve}) == pytest.approx((0.2, 1 - (1 / 101) / (1 / 81)))
    rare = [look for look in curve if look[0] % 50 == 0]  # no look between 50 and 100
    assert last_fall({"curve": rare}) == pytest.approx((0.5, 1 - (1 / 101) / (1 / 51)))
    assert last_fall({"curve": curve[:2]}) is None
