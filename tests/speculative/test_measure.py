"""The numbers of a draft: closed forms, and the verb on a real run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from selectkd.cli import main
from selectkd.evals.speculative.decode import Decoded, Round, decode, decode_alone
from selectkd.evals.speculative.measure import (
    _accepted_and_checked,
    _at,
    assisted,
    expected_speedup,
    speculation,
    timed_alone,
)
from speculative.test_decode import PROMPT, near, tiny


def test_the_expected_speedup_is_the_closed_form() -> None:
    for a in (0.0, 0.3, 0.8, 0.999):
        for g in (1, 4, 8):
            for c in (0.0, 0.1, 1.0):
                closed = (1 - a ** (g + 1)) / ((1 - a) * (g * c + 1))
                assert expected_speedup(a, g, c) == pytest.approx(closed, rel=1e-9)
    assert expected_speedup(1.0, 7, 0.5) == pytest.approx(8 / 4.5)


def test_a_token_behind_a_rejected_one_is_not_judged() -> None:
    rounds = [Round(3, 3), Round(3, 1), Round(3, 0), Round(2, 1), Round(0, 0)]
    assert _accepted_and_checked(Decoded([], rounds)) == (5, 5 + 3)
    assert [_at(rounds, place) for place in range(4)] == [3 / 4, 1 / 3, 1.0, None]


def test_a_draft_equal_to_its_target_is_accepted_everywhere_and_the_same() -> None:
    target = tiny(0)
    both = [PROMPT, PROMPT + 1]
    seen = speculation(
        target, target, both, draft_length=4, alone=timed_alone(target, both, max_new_tokens=20)
    )
    assert (seen.acceptance.value, seen.acceptance.low, seen.acceptance.high) == (1.0, 1.0, 1.0)
    assert seen.by_position == [1.0] * 4 and seen.mean_accepted_length == 5.0 and seen.same
    assert seen.tokens == 40 and seen.speedup_measured > 0 and seen.costs.ratio > 0


@pytest.mark.parametrize("g", [2, 6, 12])
def test_tokens_behind_the_end_of_sequence_count_nowhere(g: int) -> None:
    """A draft that equals its target: all of its tokens up to the end stand, and the target's own behind it is none."""
    target = tiny(0)
    alone = decode_alone(target, PROMPT, max_new_tokens=30).tokens
    eos = alone[7]
    length = alone.index(eos) + 1
    rounds = decode(target, target, PROMPT, draft_length=g, max_new_tokens=30, eos={eos}).rounds
    assert sum(one.accepted for one in rounds) <= length and all(
        one.accepted == one.proposed for one in rounds
    )
    plain = timed_alone(target, [PROMPT], max_new_tokens=30, eos={eos})
    seen = speculation(target, target, [PROMPT], draft_length=g, alone=plain)
    assert seen.tokens == length and seen.mean_accepted_length == length / len(rounds)


def test_a_worse_draft_is_accepted_less_and_is_still_the_same() -> None:
    target = tiny(0)
    both = [PROMPT, PROMPT + 1]
    alone = timed_alone(target, both, max_new_tokens=20)
    close, far = (
        speculation(target, near(target, 7, amount), both, draft_length=4, alone=alone)
        for amount in (0.02, 1.0)
    )
    assert 1 > close.acceptance.value > far.acceptance.value
    assert close.mean_accepted_length > far.mean_accepted_length >= 1
    assert close.same and far.same


def test_transformers_assisted_generation_leaves_the_drafts_settings_alone() -> None:
    target, draft = tiny(0), near(tiny(0), 7, 0.05)
    before = draft.generation_config.to_dict()
    state = torch.random.get_rng_state()
    for temperature in (0.0, 1.0):
        assert (
            assisted(target, draft, [PROMPT], draft_length=3, max_new_tokens=12, temperature=temperature) > 0
        )
    assert draft.generation_config.to_dict() == before and torch.equal(torch.random.get_rng_state(), state)


def test_speculate_reports_a_run_before_and_after(tiny_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, text = tiny_run.parent / "teacher", tiny_run.parent / "text.jsonl"
    code = main(
        ["study", "speculate", "--draft", str(tiny_run), "--before", "--target", str(teacher), "--prompts", str(text),
         "--limit", "3", "--lengths", "1,3", "--tokens", "10", "--json", "-"]
    )  # fmt: skip
    told = capsys.readouterr()
    assert code == 0, told.err
    seen = json.loads(told.out)
    contract = "draft target acceptance mean_accepted_length speedup_measured speedup_expected exact"
    assert set(contract.split()) <= seen.keys()
    assert len(seen["rows"]) == 2 * 2 * 2 and "sampled" in told.err
    assert all(row["exact"] for row in seen["rows"] if row["temperature"] == 0)
    assert all(row["exact"] is None for row in seen["rows"] if row["temperature"])
    assert seen["draft"] == str(tiny_run) and all(row["speedup_transformers"] > 0 for row in seen["rows"])


def test_another_vocabulary_is_refused(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from selectkd.cli.demo_pair import byte_tokenizer

    tiny(0).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    teacher = str(tiny_run.parent / "teacher")
    assert main(["study", "speculate", "--draft", str(tmp_path / "other"), "--target", teacher]) == 2
    assert "different tokenizers" in capsys.readouterr().err
    assert main(["study", "speculate", "--draft", teacher, "--target", teacher, "--lengths", "0,2"]) == 2
