"""kappa is recovered from curves of known rate; a real run's numbers are the ones it logged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from selectkd.cli import main
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError, DataError
from selectkd.evals.dynamics import dynamics, fit, read_looks
from selectkd.objective.objective import Objective
from selectkd.objective.pair import entropy
from selectkd.teachers.live import LiveTeacher
from selectkd.training.heldout.breakdown import ENTROPIES, binned, breakdown
from selectkd.training.heldout.evaluation import probe
from training.tiny import padded, texts, tiny_llama


def written(
    folder: Path,
    tars: Sequence[float],
    *,
    every: int = 10,
    lr: float = 1e-3,
    kls: Sequence[float] | None = None,
) -> Path:
    """A run folder whose probe had these TARs."""
    lines = []
    for index, tar in enumerate(tars):
        step = index * every
        if index:
            lines += [{"step": s, "loss": 1.0, "lr": lr} for s in range(step - every + 1, step + 1)]
        look = {
            "step": step,
            "probe_tar": tar,
            "probe_lost": 1 if index else 0,
            "probe_won": 2 if index else 0,
        }
        lines.append(look | ({} if kls is None else {"evaluation": {"kl": kls[index]}}))
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return folder


def test_kappa_of_an_exact_exponential_is_exact(tmp_path: Path) -> None:
    kappa, lr, every = 40.0, 1e-3, 10
    tars = [1 - 0.7 * float(np.exp(-kappa * lr * every * i)) for i in range(8)]
    seen = dynamics(written(tmp_path / "run", tars, lr=lr, every=every)).line
    assert seen is not None
    assert seen.kappa == pytest.approx(kappa, rel=1e-9)
    assert seen.low == pytest.approx(kappa, rel=1e-6) and seen.high == pytest.approx(kappa, rel=1e-6)
    assert seen.rate == pytest.approx(kappa * lr, rel=1e-9)
    assert np.exp(seen.intercept) == pytest.approx(0.7, rel=1e-9)


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.93), (0.6, 0.93), (0.8, 0.91)])
def test_the_interval_of_kappa_holds_the_truth_though_looks_are_correlated(
    tmp_path: Path, memory: float, least: float
) -> None:
    # 95% less 2 sigma of 400 trials, 1.1% each; less another 2% at a correlation that 30 looks hardly tell from 1,
    # where Student's interval holds the truth in half of the trials
    rng, trials, held = np.random.default_rng(0), 400, 0
    template = read_looks(written(tmp_path / "run", [0.5] * 30))
    for _ in range(trials):
        noise = [rng.normal(0, 0.05)]
        for _ in range(29):
            noise.append(memory * noise[-1] + rng.normal(0, 0.05))
        looks = [
            look.__class__(**{**look.__dict__, "tar": 1 - float(np.exp(-1 - 3.0 * look.learned + e))})
            for look, e in zip(template, noise, strict=True)
        ]
        line = fit(looks)
        assert line is not None
        held += line.low <= 3.0 <= line.high
    assert held / trials >= least


def test_theorem_1_is_told_of_every_step_between_looks(tmp_path: Path) -> None:
    seen = dynamics(written(tmp_path / "run", [0.2, 0.4, 0.3, 0.6, 0.7]))
    assert seen.line is not None and len(seen.claims) == 4
    for before, after, told in zip(seen.looks, seen.looks[1:], seen.claims, strict=False):
        room = (after.learned - before.learned) * (1 - before.tar)
        assert told.gain == pytest.approx(after.tar - before.tar)
        assert told.bound == pytest.approx(seen.line.kappa * room)
        assert told.holds == (told.gain >= told.bound) == (told.largest >= seen.line.kappa)
    assert [told.holds for told in seen.claims][1] is False  # TAR fell
    assert seen.claim_share == sum(told.holds for told in seen.claims) / 4
    assert len(seen.as_dict()["theorem_1"]) == 4


def test_steps_back_and_flips_are_counted(tmp_path: Path) -> None:
    seen = dynamics(written(tmp_path / "run", [0.2, 0.4, 0.3, 0.3, 0.6], kls=[5, 4, 4.5, 4.4, 3]))
    assert seen.nondecreasing_share == 3 / 4  # up, down, level, up
    assert (seen.lost, seen.won) == (4, 8)
    assert seen.rank_correlation is not None and seen.rank_correlation < -0.9


def test_a_probe_that_agrees_everywhere_is_left_out_of_the_fit(tmp_path: Path) -> None:
    assert dynamics(written(tmp_path / "run", [0.5, 1.0, 1.0, 1.0])).line is None
    line = dynamics(written(tmp_path / "run", [0.5, 0.6, 0.7, 1.0])).line
    assert line is not None and line.used == 3


def test_a_learning_rate_logged_now_and_then_is_summed_between(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    rows = [{"step": 0, "probe_tar": 0.1}, {"step": 5, "lr": 1.0}, {"step": 10, "lr": 2.0, "probe_tar": 0.2}]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    assert [look.learned for look in read_looks(folder)] == [
        0.0,
        pytest.approx(5 * 1.0 + 1.2 + 1.4 + 1.6 + 1.8 + 2),
    ]


def test_folders_without_looks_are_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no metrics\.jsonl"):
        dynamics(tmp_path)
    with pytest.raises(ConfigError, match="evaluate_every"):
        dynamics(written(tmp_path / "run", [0.5]))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n')
    with pytest.raises(DataError, match=r"metrics\.jsonl:2"):
        dynamics(tmp_path)


def test_the_line_that_a_running_run_is_writing_is_left_out(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", [0.5, 0.6, 0.7, 0.8])
    whole = dynamics(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 31, "lo')
    assert dynamics(folder) == whole and (folder / "metrics.jsonl").read_text().endswith('"lo')


def test_bins_hold_every_row_once() -> None:
    values = torch.tensor([0.0, 0.05, 0.1, 0.49, 0.5, 7.0])
    bins = binned(torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), values, ENTROPIES)
    assert bins == [
        {"from": 0.0, "n": 2, "acceptance": 0.5},
        {"from": 0.1, "n": 2, "acceptance": 1.0},
        {"from": 0.5, "n": 1, "acceptance": 0.0},
        {"from": 2.0, "n": 1, "acceptance": 1.0},
    ]


def test_the_breakdown_knows_the_teachers_own_entropy_and_each_rows_place() -> None:
    student, model = tiny_llama(2), tiny_llama(1, layers=3, hidden=48)
    batch = padded(texts(5), 5)[0]
    seen = supervised(batch)
    made = breakdown(student, LiveTeacher(model), batch)
    with torch.no_grad():
        logits = model(**batch.model_inputs()).logits.reshape(-1, 64)[seen.position]
    torch.testing.assert_close(
        made.teacher_entropy, entropy(torch.log_softmax(logits, -1)), rtol=1e-5, atol=1e-5
    )
    assert torch.equal(made.position, seen.offset)
    verdicts = probe(
        student, LiveTeacher(model), batch, Objective("forward_kl", {"name": "greedy_topk", "k": 20})
    )
    for bins in made.acceptance(verdicts).values():
        assert sum(one["n"] for one in bins) == len(seen)
        assert sum(one["n"] * one["acceptance"] for one in bins) == pytest.approx(float(verdicts.sum()))


def test_dynamics_of_a_real_run_are_what_it_logged(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = tmp_path / "dynamics.json"
    picture = tmp_path / "dynamics.svg"
    assert main(["study", "dynamics", str(tiny_run), "--json", str(answer), "--figure", str(picture)]) == 0
    told, lines = capsys.readouterr().out, (tiny_run / "metrics.jsonl").read_text().splitlines()
    looks = [line for line in map(json.loads, lines) if "probe_tar" in line]
    seen = json.loads(answer.read_text())
    assert [look["tar"] for look in seen["looks"]] == [look["probe_tar"] for look in looks]
    assert [look["step"] for look in seen["looks"]] == [0, 2, 4, 6, 8, 10, 12]
    assert {"kappa", "kappa_low", "kappa_high", "nondecreasing_share", "flips"} <= seen.keys()
    assert seen["kappa"] > 0 and seen["kappa_low"] < seen["kappa"] < seen["kappa_high"]
    assert seen["looks"][0]["by_position"] and seen["looks"][-1]["by_entropy"]
    assert "kappa" in told and picture.read_bytes().startswith(b"<?xml")


def test_json_to_the_terminal_is_json_alone(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "dynamics", str(tiny_run), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["run"] == str(tiny_run)


def test_answers_that_cannot_be_written_are_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "dynamics", "nowhere", "--json", str(tmp_path / "no" / "x.json")]) == 2
    assert main(["study", "dynamics", "nowhere", "--figure", str(tmp_path / "x.gif")]) == 2
    told = capsys.readouterr().err
    assert "--json" in told and ".png, .svg, .pdf" in told
