"""Answers that evaluations ask for: the model's own, one draw a sample, cut where a stop string begins."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from selectkd.evals.asking import Decoding, complete
from selectkd.evals.run_suite import run_suite
from selectkd.evals.suites import written_mathematics
from selectkd.models.load import Loaded, load_model

PROMPTS = [[5, 9, 3], [7], [4, 4, 8, 2, 6, 5]]


@pytest.fixture(scope="module")
def loaded(tiny_run: Path) -> Loaded:
    return load_model(tiny_run / "student")


def test_greedy_answers_are_those_of_transformers(loaded: Loaded) -> None:
    answers = complete(loaded, PROMPTS, Decoding(6))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = torch.tensor([prompt])
        out = loaded.model.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            pad_token_id=loaded.tokenizer.pad_token_id,
        )  # fmt: skip
        assert answer == loaded.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


def test_a_sampled_answer_depends_on_seed_and_prompt_and_not_on_its_batch(loaded: Loaded) -> None:
    sampled = Decoding(12, temperature=1.0, seed=3)
    together = complete(loaded, PROMPTS * 2, sampled)
    assert complete(loaded, PROMPTS * 2, sampled, batch_size=1) == together
    assert complete(loaded, PROMPTS[::-1], sampled) == together[:3][::-1]
    assert together[:3] != together[3:], "the second text of a prompt is a draw of its own"
    assert complete(loaded, PROMPTS, Decoding(12, temperature=1.0, seed=4)) != together[:3]


def test_an_answer_ends_before_a_stop_string_and_every_batch_is_heard_of(loaded: Loaded) -> None:
    heard: list[int] = []
    whole = complete(loaded, PROMPTS, Decoding(6), batch_size=2, on_progress=heard.append)
    assert heard == [2, 3]
    word = whole[0].split()[2]
    (cut,) = complete(loaded, PROMPTS[:1], Decoding(6, stop=(word,)))
    assert cut == whole[0][: whole[0].index(word)]


def test_answers_that_the_limit_ended_are_counted_and_graders_that_disagree(
    loaded: Loaded, tmp_path: Path
) -> None:
    problems = [{"question": "1 + 1?", "answer": "#### 2"}, {"question": "2 + 2?", "answer": "#### 4"}]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in problems), "utf-8")
    heard: list[str] = []
    suite = written_mathematics(file, None, tokens=1)
    disagreeing = replace(suite, score=lambda i, said: 0.0, second=lambda i, said: float(i == 1))
    seen = run_suite("tiny", loaded, disagreeing, on_progress=heard.append)
    assert seen.disputed == [1] and seen.as_row()["settings"]["disputed"] == 1
    assert [row["disputed"] for row in seen.answer_rows()] == [False, True]
    assert seen.cut > 0 and f"{seen.cut} of 2 answers cut at 1 tokens; 1 scored otherwise" in heard[-1]
    ended = run_suite("tiny", loaded, replace(suite, decoding=Decoding(1, stop=("",))))
    assert ended.cut == 0
