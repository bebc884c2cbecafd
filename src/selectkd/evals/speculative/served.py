"""Speculative decoding that a server does: how fast it writes, and what it says of its drafts.

Which models it runs is the server's affair; what can be seen from outside is its text, its pace, and the counts it
publishes: vLLM's counters under /metrics, SGLang's meta_info of each answer. A server that publishes neither gets no
acceptance, and the reason stands in its place.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from selectkd.rollouts.completion_server import BYTES, FRAME, CompletionServer, tokens_of
from selectkd.rollouts.generate import Completion, Request
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.remote.answers import WrongAnswer, is_object, json_object
from selectkd.teachers.remote.connection import NotThere, Question, Reply

METRICS_BYTES = 1 << 23
"""A page of counters: a few hundred kilobytes, more with many models."""
SETTLED = 20
"""Looks at a server's counters, a tenth of a second apart, until two are the same: it writes them after it answers."""

COUNTER = re.compile(
    r"^vllm:(generation_tokens|spec_decode_num_(?:drafts|draft_tokens|accepted_tokens|accepted_tokens_per_pos))"
    r"(?:_total)?(?:\{(.*)\})?\s+([0-9.eE+-]+)\s*$",
    re.MULTILINE,
)
PLACE = re.compile(r'position="(\d+)"')

MOST = 2.0**53
"""No counter goes so far, and up to here fp64 counts every one."""

Kind = Literal["vllm", "sglang", "openai"]


@dataclass(frozen=True)
class Counts:
    """What a server says of its drafts: passes of the target that judged one, draft tokens written, and accepted.

    at: how many were accepted at each place of a draft; () where the server does not say.
    """

    passes: int
    drafted: int
    accepted: int
    at: tuple[int, ...] = ()

    @property
    def acceptance(self) -> float | None:
        """The share of judged draft tokens that stood, as ``Speculation`` counts them: a token behind a rejected one is
        not judged. None without ``at``. Drafts are taken to be of full length: shorter ones make it a lower bound.
        """
        checked = self.passes + sum(self.at[:-1])
        return self.accepted / checked if self.at and checked else None

    @property
    def by_position(self) -> list[float | None]:
        """The same at each place of a draft; None where no token was checked."""
        checked = (self.passes, *self.at[:-1])
        return (
            [stood / seen if seen else None for stood, seen in zip(self.at, checked, strict=True)]
            if self.at
            else []
        )

    @property
    def of_drafted(self) -> float | None:
        """Accepted over all draft tokens, those behind a rejected one among them: what servers call acceptance rate."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def mean_accepted_length(self) -> float | None:
        """Tokens a pass, the target's own among them."""
        return 1 + self.accepted / self.passes if self.passes else None


@dataclass(frozen=True)
class Served:
    """A server's texts of the prompts, the seconds they took together, and its counts; not_published: why there are
    none.
    """

    texts: list[list[int]]
    seconds: float
    counts: Counts | None
    not_published: str | None

    @property
    def tokens(self) -> int:
        """All that was written."""
        return sum(map(len, self.texts))

    @property
    def pace(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


def served(
    server: CompletionServer,
    kind: Kind,
    requests: Sequence[Request],
    *,
    tokenizer: Any,
    end: int | None,
    temperature: float = 0.0,
    seed: int = 0,
) -> Served:
    """Has ``server`` write all requests, after one that is not counted, which loads what loads at first use.

    Prompts go out as token ids. end: the id that ends a text, None where the tokenizer has none. The seed goes to vLLM
    alone. TeacherError where the server gives no text.
    """
    sampling = Sampling(temperature)
    questions = [
        _generate(one, sampling, tokenizer, end)
        if kind == "sglang"
        else _completion(server, one, sampling, tokenizer, end, seed)
        for one in requests
    ]
    server.answers(questions[:1])
    before = _settled(server) if kind == "vllm" else None
    started = time.perf_counter()
    answers = server.answers(questions)
    seconds = time.perf_counter() - started
    texts = [text.ids for text, _ in answers]
    if kind == "vllm":
        counts, not_published = _difference(before, _settled(server), sum(map(len, texts)), len(texts))
    elif kind == "sglang":
        counts, not_published = _summed([counts for _, counts in answers])
    else:
        counts, not_published = None, "an OpenAI-compatible server says nothing of its drafts"
    return Served(texts, seconds, counts, not_published)


def counters(page: str) -> dict[tuple[str, int], float] | None:
    """vLLM's counters of a page of /metrics, (name, place) -> count over all engines; None without one of drafts.

    >>> page = 'vllm:spec_decode_num_drafts_total{engine="0"} 3.0\\n'
    >>> counters(page), counters("# nothing")
    ({('spec_decode_num_drafts', 0): 3.0}, None)
    """
    found: dict[tuple[str, int], float] = {}
    for name, labels, value in COUNTER.findall(page):
        place = PLACE.search(labels)
        key = (name, int(place.group(1)) if place else 0)
        try:
            count = float(value)
        except ValueError:
            count = math.nan
        if not 0 <= count < MOST:
            raise WrongAnswer(f"{name} is {value[:20]}, which counts nothing")
        found[key] = found.get(key, 0.0) + count
    return found if any(name.startswith("spec_decode") for name, _ in found) else None


def counts_of(meta: dict[str, Any]) -> Counts | None:
    """SGLang's counts of one answer's meta_info, under the names of its versions; None without them.

    >>> counts_of({"spec_verify_ct": 4, "spec_accept_token_num": 5, "spec_draft_token_num": 12,
    ...            "spec_accept_histogram": [1, 1, 2]})
    Counts(passes=4, drafted=12, accepted=5, at=(3, 2))
    """

    def first(*names: str) -> Any:
        return next((meta[name] for name in names if meta.get(name) is not None), None)

    passes = first("spec_verify_ct")
    accepted = first("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
    drafted = first("spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")
    steps = first("spec_correct_drafts_histogram", "spec_accept_histogram")
    numbers = (passes, accepted, drafted)
    if not all(map(_counts, numbers)):
        return None
    whole = isinstance(steps, list) and all(map(_counts, steps))
    # entry i: passes that accepted i draft tokens; a place of the draft stood in every pass that accepted more
    at = tuple(sum(steps[place + 1 :]) for place in range(len(steps) - 1)) if whole else ()
    return Counts(passes, drafted, accepted, at if sum(at) == accepted else ())


def _counts(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST


def _completion(
    server: CompletionServer, request: Request, sampling: Sampling, tokenizer: Any, end: int | None, seed: int
) -> Question[tuple[Completion, Counts | None]]:
    plain = server.question(request, sampling, tokenizer, end, seed)
    return Question(plain.path, plain.content, plain.cap, lambda reply: (plain.read(reply), None), plain.what)


def _generate(
    request: Request, sampling: Sampling, tokenizer: Any, end: int | None
) -> Question[tuple[Completion, Counts | None]]:
    """SGLang's own path, whose answers carry the counts."""
    body = {
        "input_ids": list(request.prompt),
        "sampling_params": {
            "max_new_tokens": request.limit, "temperature": sampling.temperature, "top_p": sampling.top_p,
        },
    }  # fmt: skip

    def read(reply: Reply) -> tuple[Completion, Counts | None]:
        body = json_object(reply.body)
        meta = is_object(body.get("meta_info"), "meta_info")
        ids, text, reason = body.get("output_ids"), body.get("text"), meta.get("finish_reason")
        stopped = isinstance(reason, dict) and reason.get("type") == "stop"
        if isinstance(ids, list):
            own = tokens_of(ids, "output_ids", tokenizer)
            return Completion(own[: request.limit], ended=stopped), counts_of(meta)
        if not isinstance(text, str):
            raise WrongAnswer("the answer has neither output_ids nor text")
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        ids += [end] if stopped and end is not None else []
        return Completion(ids[: request.limit], ended=stopped), counts_of(meta)

    cap = FRAME + BYTES * (request.limit + len(request.prompt))
    return Question("/generate", json.dumps(body).encode(), cap, read, what="a completion")


def _settled(server: CompletionServer) -> dict[tuple[str, int], float] | None:
    """vLLM's counters once they stand still; None where the server has none."""
    question = Question(
        "/metrics",
        None,
        METRICS_BYTES,
        lambda reply: counters(reply.body.decode("utf-8", "replace")),
        "counters",
    )
    seen: dict[tuple[str, int], float] | None = None
    for _ in range(SETTLED):
        try:
            (now,) = server.answers([question])
        except NotThere:
            return None
        if now is None or now == seen:
            return now
        seen = now
        time.sleep(0.1)
    return seen  # others use it: what it wrote will not be what it wrote for us


def _difference(before: Any, after: Any, tokens: int, texts: int) -> tuple[Counts | None, str | None]:
    """The counts between two looks at vLLM's counters, in which ``tokens`` tokens of ``texts`` texts were written."""
    if before is None or after is None:
        return (
            None,
            "its /metrics has no vllm:spec_decode counters: it does not speculate, or keeps no statistics",
        )

    def grown(name: str, place: int = 0) -> int:
        return round(after.get((name, place), 0.0) - before.get((name, place), 0.0))

    wrote = grown("generation_tokens")
    if ("generation_tokens", 0) in after and abs(wrote - tokens) > texts:
        return None, f"it wrote {wrote} tokens meanwhile and {tokens} for us: its counts are of others too"
    passes = grown("spec_decode_num_drafts")
    if not passes:
        return None, "it drafted nothing meanwhile"
    places = sorted(place for name, place in after if name == "spec_decode_num_accepted_tokens_per_pos")
    at = tuple(grown("spec_decode_num_accepted_tokens_per_pos", place) for place in places)
    accepted = grown("spec_decode_num_accepted_tokens")
    drafted = grown("spec_decode_num_draft_tokens")
    return Counts(passes, drafted, accepted, at if sum(at) == accepted else ()), None


def _summed(given: Sequence[Counts | None]) -> tuple[Counts | None, str | None]:
    """The counts of all answers together."""
    known = [one for one in given if one is not None]
    if len(known) < len(given):
        return None, "its answers have no spec_verify_ct in meta_info: it does not speculate"
    passes = sum(one.passes for one in known)
    if not passes:
        return None, "it drafted nothing meanwhile"
    longest = max(len(one.at) for one in known)
    whole = all(one.at or not one.accepted for one in known)
    at = tuple(sum(one.at[i] for one in known if i < len(one.at)) for i in range(longest)) if whole else ()
    return Counts(passes, sum(one.drafted for one in known), sum(one.accepted for one in known), at), None
