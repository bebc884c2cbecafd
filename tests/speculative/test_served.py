"""A server that speculates, told from outside: its pace, its counts where it publishes them, and why not where not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from selectkd.cli import main
from selectkd.evals.speculative.decode import Decoded, Round, decode, decode_alone
from selectkd.evals.speculative.measure import _accepted_and_checked, _at
from selectkd.evals.speculative.served import Counts, _summed, counters, counts_of
from selectkd.models.load import load_model
from speculative.test_decode import near
from teachers.served import Answer, Served, on_a_port

LENGTH = 3


def counted(rounds: list[Round]) -> Counts:
    """The counts that a server publishes of its passes."""
    at = tuple(sum(one.accepted > place for one in rounds) for place in range(LENGTH))
    return Counts(len(rounds), sum(one.proposed for one in rounds), sum(one.accepted for one in rounds), at)


class Speculating(Served):
    """A tiny target with a draft, behind vLLM's or SGLang's paths; draft None: plain decoding.

    others: tokens that someone else has written between two looks. silent: nothing is published.
    """

    def __init__(self, target: Any, draft: Any, kind: str) -> None:
        super().__init__(target, kind)
        self.draft, self.others, self.silent, self.rounds, self.wrote = draft, 0, False, list[Round](), 0

    def plain(self, path: str, content: bytes) -> Answer:
        if path == "/metrics" and self.kind == "vllm" and not self.silent:
            self.wrote += self.others
            return 200, {"content-type": "text/plain"}, self.page().encode()
        asked = json.loads(content or b"{}")
        if path == "/v1/completions" and self.kind != "sglang" and asked["model"] == "tiny":
            seen, _ = self.decoded(asked["prompt"], asked["max_tokens"], asked["temperature"])
            told = {"text": "", "token_ids": seen.tokens, "finish_reason": "length"}
            return 200, {}, json.dumps({"choices": [told]}).encode()
        if path == "/generate" and self.kind == "sglang":
            sampling = asked["sampling_params"]
            seen, counts = self.decoded(
                asked["input_ids"], sampling["max_new_tokens"], sampling["temperature"]
            )
            meta: dict[str, Any] = {
                "completion_tokens": len(seen.tokens),
                "finish_reason": {"type": "length"},
            }
            if self.draft is not None and not self.silent:
                steps = [sum(one.accepted == n for one in seen.rounds) for n in range(LENGTH + 1)]
                meta |= {
                    "spec_verify_ct": counts.passes, "spec_accept_token_num": counts.accepted,
                    "spec_draft_token_num": counts.drafted, "spec_accept_histogram": steps,
                }  # fmt: skip
            return 200, {}, json.dumps({"text": "", "output_ids": seen.tokens, "meta_info": meta}).encode()
        return 404, {}, b"{}"

    def decoded(self, prompt: list[int], limit: int, temperature: float) -> tuple[Decoded, Counts]:
        ids, options = (
            torch.tensor(prompt),
            {"max_new_tokens": limit, "temperature": temperature, "eos": (2,)},
        )
        seen = (
            decode_alone(self.model, ids, **options)  # pyright: ignore[reportArgumentType]
            if self.draft is None
            else decode(self.model, self.draft, ids, draft_length=LENGTH, **options)  # pyright: ignore[reportArgumentType]
        )
        self.rounds += [one for one in seen.rounds if one.proposed]
        self.wrote += len(seen.tokens)
        return seen, counted(seen.rounds)

    def page(self) -> str:
        """The counters of vLLM's /metrics, of two engines."""
        told, name = counted(self.rounds), 'model_name="a {strange} name"'
        lines = ["# HELP vllm:generation_tokens_total Number of generation tokens processed."]
        lines += [f'vllm:generation_tokens_total{{engine="0",{name}}} {float(self.wrote)}']
        if self.draft is not None:
            for what, count in (
                ("drafts", told.passes), ("draft_tokens", told.drafted), ("accepted_tokens", told.accepted),
            ):  # fmt: skip
                lines += [f'vllm:spec_decode_num_{what}_total{{engine="0",{name}}} {count - 1}.0']
                lines += [f'vllm:spec_decode_num_{what}_total{{engine="1",{name}}} 1.0']
                lines += [f'vllm:spec_decode_num_{what}_created{{engine="0",{name}}} 1.76e+09']
            for place, count in enumerate(told.at):
                labels = f'engine="0",{name},position="{place}"'
                lines += [f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {float(count)}"]
        return "\n".join(lines) + "\n"


Verb = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def verb(tiny_run: Path, tmp_path: Path) -> Iterator[Verb]:
    """The command with scripted servers: the speculating one, and one without a draft where ``plain`` is given."""
    teacher, answer = tiny_run.parent / "teacher", tmp_path / "speculate.json"
    with ExitStack() as stack:

        def run(
            server: Speculating, plain: Speculating | None = None, *more: str
        ) -> tuple[int, dict[str, Any]]:
            flags = ["--server", stack.enter_context(on_a_port(server))]
            if plain is not None:
                flags += ["--plain-server", stack.enter_context(on_a_port(plain)) + "/v1"]
            code = main(
                ["study", "speculate", "--target", str(teacher), *flags, "--server-model", "tiny",
                 "--server-kind", server.kind,
                 "--prompts", str(tiny_run.parent / "text.jsonl"), "--limit", "4", "--tokens", "13", "--json",
                 str(answer), *more]
            )  # fmt: skip
            return code, json.loads(answer.read_text()) if code == 0 else {}

        yield run


@pytest.fixture
def pair(tiny_run: Path) -> tuple[Any, Any]:
    """The target, and a draft near it."""
    target = load_model(tiny_run.parent / "teacher").model
    return target, near(target, 7, 0.05)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_servers_counts_become_the_numbers_that_a_draft_in_memory_has(
    kind: str, pair: tuple[Any, Any], verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = pair
    server = Speculating(target, draft, kind)
    code, seen = verb(server, Speculating(target, None, kind))
    out = capsys.readouterr().out
    assert code == 0
    greedy, sampled = seen["rows"]
    assert seen["server"] == greedy["server"] and greedy["temperature"] == 0 and sampled["temperature"] == 1
    contract = "draft target acceptance mean_accepted_length speedup_measured speedup_expected exact"
    assert set(contract.split()) <= seen.keys()
    # the same prompts with the same models here
    asked = [
        json.loads(content)
        for path, _, content in server.requests
        if path in ("/v1/completions", "/generate")
    ]
    prompts = [one.get("prompt") or one["input_ids"] for one in asked][1:5]
    passes = [
        one
        for prompt in prompts
        for one in decode(
            target, draft, torch.tensor(prompt), draft_length=LENGTH, max_new_tokens=13, eos=(2,)
        ).rounds
        if one.proposed or kind == "sglang"
    ]
    told = counted(passes)
    assert greedy["accepted_of_drafted"] == pytest.approx(told.accepted / told.drafted)
    assert greedy["mean_accepted_length"] == pytest.approx(1 + told.accepted / told.passes)
    assert greedy["acceptance_by_position"] == told.by_position
    assert greedy["acceptance"] == told.acceptance is not None and 0 < greedy["acceptance"] < 1
    assert greedy["exact"] is True and sampled["exact"] is None and greedy["not_published"] is None
    assert greedy["speedup_measured"] == pytest.approx(
        greedy["tokens_per_second"] / greedy["plain_tokens_per_second"]
    )
    assert len(asked) == 2 * (1 + 4), (
        "at each temperature one request that is not counted, then each prompt once"
    )
    assert "yes" in out and "sampled" in out


def test_counts_of_full_drafts_are_those_of_the_rounds() -> None:
    rounds = [Round(3, 3), Round(3, 1), Round(3, 0), Round(3, 2), Round(3, 3)]
    seen, (accepted, judged) = counted(rounds), _accepted_and_checked(Decoded([], rounds))
    assert seen.acceptance == accepted / judged and seen.of_drafted == accepted / 15
    assert seen.by_position == [_at(rounds, place) for place in range(3)]
    assert seen.mean_accepted_length == 1 + 9 / 5
    nothing = Counts(0, 0, 0)
    assert (nothing.acceptance, nothing.of_drafted, nothing.mean_accepted_length, nothing.by_position) == (
        None, None, None, [],
    )  # fmt: skip
    assert Counts(4, 12, 6).acceptance is None and Counts(4, 12, 6).mean_accepted_length == 2.5


def test_a_server_that_publishes_nothing_gets_no_acceptance_and_the_reason(
    pair: tuple[Any, Any], verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = pair
    for kind, reason in (
        ("vllm", "no vllm:spec_decode"),
        ("sglang", "spec_verify_ct"),
        ("openai", "nothing of its"),
    ):
        for server in (Speculating(target, draft, kind), Speculating(target, None, kind)):
            server.silent = server.draft is not None
            code, seen = verb(server, None, "--temperature", "0")
            out = capsys.readouterr().out
            (row,) = seen["rows"]
            assert code == 0 and reason in row["not_published"] and reason in out
            assert row["acceptance"] is row["mean_accepted_length"] is row["accepted_of_drafted"] is None
            assert row["speedup_measured"] is row["exact"] is None and "without --plain-server" in out
            assert row["tokens_per_second"] > 0


def test_counts_of_a_server_that_others_use_are_not_reported(pair: tuple[Any, Any], verb: Verb) -> None:
    busy = Speculating(*pair, "vllm")
    busy.others = 40
    code, seen = verb(busy, None, "--temperature", "0")
    assert code == 0 and seen["acceptance"] is None and "of others too" in seen["not_published"]


def test_two_servers_that_write_differently_are_told(
    pair: tuple[Any, Any], verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    target, draft = pair
    code, seen = verb(Speculating(target, draft, "vllm"), Speculating(near(target, 3, 1.0), None, "vllm"))
    assert code == 0 and seen["exact"] is False and "NO: the two servers" in capsys.readouterr().out


def test_students_and_a_server_stand_in_one_answer(pair: tuple[Any, Any], verb: Verb, tiny_run: Path) -> None:
    more = ["--draft", str(tiny_run), "--lengths", "2", "--no-transformers", "--temperature", "0"]
    code, seen = verb(Speculating(*pair, "vllm"), None, *more)
    assert code == 0 and [row["server"] is None for row in seen["rows"]] == [True, False]
    assert seen["rows"][0]["draft"] == str(tiny_run) and seen["rows"][0]["exact"] is True


def test_flags_that_do_not_go_together_are_refused_before_anything_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags, told in (
        ([], "--draft"), (["--plain-server", "http://x"], "--server"), (["--server", "http://x"], "--server-model"),
        (["--server", "http://x", "--server-model", "m", "--api-key-env", "NO_SUCH"], "NO_SUCH"),
    ):  # fmt: skip
        assert main(["study", "speculate", "--target", "no-such/model", *flags]) == 2
        err = capsys.readouterr().err
        assert told in err and "no-such/model" not in err


def test_a_server_that_is_not_there_or_does_not_answer_is_a_teacher_error(
    pair: tuple[Any, Any], verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    strange = Speculating(*pair, "vllm")
    assert verb(strange, None, "--server-model", "other")[0] == 4 and "404" in capsys.readouterr().err
    wrong = Speculating(*pair, "sglang")
    wrong.fault = lambda path, answer: (200, {}, b'{"meta_info": {}}')
    assert verb(wrong)[0] == 4 and "neither output_ids nor text" in capsys.readouterr().err


def test_counts_are_read_under_the_names_of_every_version_and_doubted_where_they_disagree() -> None:
    for accepted, drafted, steps in (
        ("spec_num_correct_drafts", "spec_num_proposed_drafts", "spec_correct_drafts_histogram"),
        ("spec_accepted_drafts", "spec_proposed_drafts", "spec_accept_histogram"),
        ("spec_accept_token_num", "spec_draft_token_num", "spec_accept_histogram"),
    ):
        meta = {"spec_verify_ct": 4, accepted: 5, drafted: 12, steps: [1, 1, 2, 0]}
        assert counts_of(meta) == Counts(4, 12, 5, (3, 2, 0))
        assert counts_of({**meta, steps: [9, 9]}) == Counts(4, 12, 5), "counts by place that do not add up"
        assert counts_of({**meta, steps: "x"}) == Counts(4, 12, 5)
        assert counts_of({**meta, accepted: None}) is None and counts_of({**meta, drafted: -1}) is None
    one, other = Counts(4, 12, 5, (3, 2, 0)), Counts(2, 4, 0)
    assert _summed([one, other]) == (Counts(6, 16, 5, (3, 2, 0)), None)
    assert _summed([one, Counts(2, 4, 1)]) == (Counts(6, 16, 6), None), "an answer without places leaves none"
    assert _summed([one, None])[0] is None and _summed([Counts(0, 0, 0)])[0] is None
    assert counters("vllm:generation_tokens_total 5.0\n") is None
