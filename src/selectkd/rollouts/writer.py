"""RolloutWriter: replaces the answers of a step's batches by generated ones, as each source's policy says."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from selectkd.data.collate import Batch
from selectkd.data.example import Example
from selectkd.data.rewrite import Rollout, examples_of, last_turns, rebuilt
from selectkd.data.vision import Vision
from selectkd.errors import ConfigError
from selectkd.models.precision import FP32, Precision
from selectkd.models.sharded import whole_while
from selectkd.objective.uniforms import uniforms
from selectkd.rollouts.adaptive import AdaptiveScheduler
from selectkd.rollouts.generate import Request, generate, prompt_key
from selectkd.rollouts.replay import ReplayBuffer
from selectkd.rollouts.rules import Draw, Interleaved, Mixed, Rule
from selectkd.rollouts.sampling import Sampling
from selectkd.rollouts.served_student import ServedStudent
from selectkd.rollouts.streams import Stream

NEEDS_TEACHER = ("teacher", "pairs", "interleaved", "teacher_mixed")
"""Policies for which the teacher writes, and must be a model in memory."""
CHOICE, REPLAY = 1, 2
"""Numbers that keep the draws of a decision apart from those of the text."""
KEPT = 20_000
"""Teacher's texts that are kept in memory; they can be written again at any time, the same."""


@dataclass
class RolloutWriter:
    """(batch, step) -> the batch with its text written, by the policy of each sample's source.

    student, teacher: the models that write (teacher None where no policy needs one). streams: of the run; the first
    ones are the sources'. ends, width: as ``generate`` takes them. steps: optimizer steps of the run, for the
    adaptive scheduler. served: servers that write a source's student text in the student's place. Whatever is drawn
    is a function of (seed, step, the prompt), so a run that is taken up again with ``state_dict`` writes what it would
    have written; the teacher's text of a prompt is the same at every step. A prompt that fills ``max_length`` keeps
    the text it has. precision: the student writes as it trains, the teacher alone in its own dtype. vision: the
    processor of a student that sees images.
    """

    policies: Sequence[Any]
    streams: Sequence[Stream]
    student: nn.Module
    teacher: nn.Module | None
    ends: frozenset[int]
    width: int
    pad_id: int
    max_length: int
    max_new_tokens: int | None = None
    seed: int = 42
    steps: int = 1
    precision: Precision = FP32
    served: Mapping[int, ServedStudent] = field(default_factory=dict)
    vision: Vision | None = None
    buffers: dict[int, ReplayBuffer] = field(default_factory=dict, init=False)
    schedulers: dict[int, AdaptiveScheduler] = field(default_factory=dict, init=False)
    counts: Counter[str] = field(default_factory=Counter, init=False)
    seconds: float = field(default=0.0, init=False)
    _teacher_text: dict[tuple[int, Sampling, int], list[int]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        for number, policy in enumerate(self.policies):
            if policy.name in NEEDS_TEACHER and self.teacher is None and not _has_text(policy):
                raise ConfigError(
                    f"the policy {policy.name} has the teacher write, so the teacher must be one whole model in "
                    "memory. Use teacher: {model: ...}, or write its text beforehand with `selectkd generate`."
                )
            if policy.name == "adaptive":
                self.buffers[number] = ReplayBuffer(policy.capacity, vision=self.vision)
                self.schedulers[number] = AdaptiveScheduler(
                    policy.start, policy.increase, policy.margin, policy.fill_first
                )
            elif policy.name == "student" and policy.replay is not None:
                self.buffers[number] = ReplayBuffer(policy.replay, vision=self.vision)
        self._stream = {(stream.source, stream.writer): i for i, stream in enumerate(self.streams)}

    def __call__(self, batch: Batch, step: int) -> Batch:
        """The batch of optimizer step ``step`` with its text written; one without generated text as it is."""
        with whole_while(self.student):  # the ranks write as many tokens as their own texts have
            return self._with_text(batch, step)

    def _with_text(self, batch: Batch, step: int) -> Batch:
        if all(self.policies[source].name == "dataset" for source in batch.stream.tolist()):
            return batch
        started = time.perf_counter()
        whole, turns = examples_of(batch), last_turns(batch)
        written: list[list[Example]] = [[] for _ in turns]
        for source in sorted({turn.stream for turn in turns}):
            chosen = [i for i, turn in enumerate(turns) if turn.stream == source]
            texts = self._write(source, [turns[i] for i in chosen], [whole[i] for i in chosen], step)
            for i, text in zip(chosen, texts, strict=True):
                written[i] = text
        self.seconds += time.perf_counter() - started
        return rebuilt(batch, [one for texts in written for one in texts], pad_id=self.pad_id)

    def _write(
        self, source: int, turns: list[Rollout], whole: list[Example], step: int
    ) -> list[list[Example]]:
        """For each sample of one source the samples that are trained on in its place."""
        policy = self.policies[source]
        name = policy.name
        as_it_is = [[example] for example in whole]
        if name == "dataset":
            return as_it_is
        if name == "teacher":
            return self._answered(as_it_is, self._by_teacher(policy, turns), source, "teacher")
        if name == "pairs":
            by_teacher = (
                self._answered(as_it_is, self._by_teacher(policy, turns), source, "teacher")
                if policy.teacher_text == "generate"
                else as_it_is
            )
            by_student = self._answered(
                as_it_is, self._fresh(source, turns, step), source, "student", drop=True
            )
            return [[*one, *other] for one, other in zip(by_teacher, by_student, strict=True)]
        if name == "student":
            keys = torch.tensor(
                [prompt_key(turn.prompt, 0, turn.images) for turn in turns], dtype=torch.int64
            )
            number = uniforms(len(turns), 1, seed=self.seed, step=step, rank=CHOICE, counter=keys)[:, 0]
            chosen = [i for i, one in enumerate(number.tolist()) if one < policy.probability]
            texts = self._fresh(source, [turns[i] for i in chosen], step)
            if policy.replay is not None:
                texts = self._through_buffer(source, [turns[i] for i in chosen], texts, step)
            result = list(as_it_is)
            parts = self._answered([as_it_is[i] for i in chosen], texts, source, "student")
            for i, part in zip(chosen, parts, strict=True):
                result[i] = part
            return result
        if name == "adaptive":
            return self._adaptive(source, policy, turns, as_it_is, step)
        rule: Rule = (
            Interleaved(_sampling(policy), policy.window)
            if name == "interleaved"
            else Mixed(_sampling(policy), policy.share)
        )
        texts = self._generated([self.student, self._the_teacher()], policy, turns, rule, step)
        parts = self._answered(as_it_is, texts, source, "both")
        if not getattr(policy, "with_source", False):
            return parts
        return [[*one, *other] for one, other in zip(as_it_is, parts, strict=True)]

    def _adaptive(
        self, source: int, policy: Any, turns: list[Rollout], as_it_is: list[list[Example]], step: int
    ) -> list[list[Example]]:
        buffer, scheduler = self.buffers[source], self.schedulers[source]
        number = float(uniforms(1, 1, seed=self.seed, step=step, rank=CHOICE, micro=source))
        chosen = scheduler.source(number, step, self.steps, stored=len(buffer), full=buffer.full)
        self.counts[chosen] += len(turns)
        if chosen == "dataset":
            return as_it_is
        if chosen == "fresh":
            texts = self._fresh(source, turns, step)
            for text in texts:
                if text is not None:
                    buffer.add(text)
        else:
            texts = [buffer.at(one) for one in self._places(turns, step)]
        return self._answered(as_it_is, texts, source, "student")

    def _through_buffer(self, source: int, turns: list[Rollout], texts: list[Text], step: int) -> list[Text]:
        """The fresh texts into the buffer, and as many drawn from it."""
        buffer = self.buffers[source]
        for text in texts:
            if text is not None:
                buffer.add(text)
        if not len(buffer):
            return texts
        return [buffer.at(one) for one in self._places(turns, step)]

    def _places(self, turns: Sequence[Rollout], step: int) -> list[float]:
        keys = torch.tensor([prompt_key(turn.prompt, 0, turn.images) for turn in turns], dtype=torch.int64)
        return uniforms(len(turns), 1, seed=self.seed, step=step, rank=REPLAY, counter=keys)[:, 0].tolist()

    def _fresh(self, source: int, turns: Sequence[Rollout], step: int) -> list[Text]:
        policy = self.policies[source]
        return self._generated(
            [self.student], policy, turns, Draw(_sampling(policy)), step, self.served.get(source)
        )

    def _by_teacher(self, policy: Any, turns: Sequence[Rollout]) -> list[Text]:
        """The teacher's text of each prompt, written once for each way of writing it: its sampling and its limit."""
        keys = [
            (prompt_key(turn.prompt, 0, turn.images), _sampling(policy), self._most(policy, turn))
            for turn in turns
        ]
        new = {key: turn for key, turn in zip(keys, turns, strict=True) if key not in self._teacher_text}
        if new:
            rule = Draw(_sampling(policy))
            # not counted: a run that is taken up again writes it anew, and its log must be the same
            counted, self.counts = self.counts, Counter()
            written = self._generated([self._the_teacher()], policy, list(new.values()), rule, step=0)
            self.counts = counted
            for key, text in zip(new, written, strict=True):
                self._teacher_text[key] = [] if text is None else text.completion
        found = [self._teacher_text[key] for key in keys]
        for oldest in list(self._teacher_text)[:-KEPT]:
            del self._teacher_text[oldest]
        return [
            replace(turn, completion=ids) if ids else None for turn, ids in zip(turns, found, strict=True)
        ]

    def _generated(
        self, models: list[nn.Module], policy: Any, turns: Sequence[Rollout], rule: Rule, step: int,
        served: ServedStudent | None = None,
    ) -> list[Text]:  # fmt: skip
        """Each turn with a new completion; None where the prompt fills ``max_length``."""
        limits = [self._most(policy, turn) for turn in turns]
        able = [i for i, one in enumerate(limits) if one > 0 and turns[i].prompt]
        requests = [Request(turns[i].prompt, limits[i], images=turns[i].images) for i in able]
        if served is not None:
            end = min(self.ends, default=None)
            texts = served.complete(requests, _sampling(policy), end=end, seed=self.seed, step=step)
        else:
            device = next(models[0].parameters()).device
            precision = self.precision if models[0] is self.student else FP32
            with precision.autocast(device):
                texts = generate(
                    models, requests, rule, ends=self.ends, width=self.width, seed=self.seed, step=step,
                )  # fmt: skip
        result: list[Text] = [None] * len(turns)
        for i, text in zip(able, texts, strict=True):
            result[i] = replace(turns[i], completion=text.ids)
            self.counts["texts"] += 1
            self.counts["tokens"] += len(text.ids)
            self.counts["replaced"] += text.replaced
            self.counts["ended"] += text.ended
        return result

    def _most(self, policy: Any, turn: Rollout) -> int:
        """How many tokens may follow a prompt; 0 or less where the prompt fills ``max_length``."""
        most = policy.max_new_tokens or self.max_new_tokens or self.max_length
        return min(most, self.max_length - len(turn.prompt))

    def _answered(
        self, as_it_is: list[list[Example]], texts: Sequence[Text], source: int, writer: str, *, drop: bool = False,
    ) -> list[list[Example]]:  # fmt: skip
        """The samples with these texts for their answers; one without a text stays, or is dropped."""
        stream = self._stream[(source, writer)]
        result = []
        for old, text in zip(as_it_is, texts, strict=True):
            if text is None:
                self.counts["no_room"] += 1
                result.append([] if drop else old)
            else:
                result.append([replace(text, stream=stream).example])
        return result

    def _the_teacher(self) -> nn.Module:
        assert self.teacher is not None  # __post_init__ checks it
        return self.teacher

    def evaluated(self, loss: float) -> None:
        """Passes a held-out loss, in nats a token of the text, to the adaptive schedulers."""
        for scheduler in self.schedulers.values():
            scheduler.evaluated(loss)

    def log_fields(self) -> dict[str, Any]:
        """Fields of a log line since the last call: ``written`` and ``writing_seconds``.

        ``written`` counts texts (the teacher's own left out) and tokens, the fraction that reached an end token, the
        fraction of tokens a second model replaced, steps since a server had the student's weights, buffers and phi.
        """
        counts, seconds = self.counts, self.seconds
        self.counts, self.seconds = Counter(), 0.0
        tokens = counts["tokens"]
        written: dict[str, Any] = {
            "texts": counts["texts"],
            "tokens": tokens,
            "ended": counts["ended"] / counts["texts"] if counts["texts"] else None,
            "replaced": counts["replaced"] / tokens if tokens else None,
        }
        written |= {name: counts[name] for name in ("fresh", "replay", "dataset", "no_room") if counts[name]}
        if self.served:
            written["staleness"] = max(one.staleness for one in self.served.values())
        if self.buffers:
            written["stored"] = sum(map(len, self.buffers.values()))
        if self.schedulers:
            written["phi"] = max(scheduler.phi for scheduler in self.schedulers.values())
        return {"written": written, "writing_seconds": seconds}

    def state_dict(self) -> dict[str, Any]:
        """Plain data that a resumed run needs: buffers, schedulers, the counts of the next log line."""
        return {
            "counts": dict(self.counts),
            "buffers": {str(source): buffer.state_dict() for source, buffer in self.buffers.items()},
            "schedulers": {str(source): one.state_dict() for source, one in self.schedulers.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = Counter(state["counts"])
        for source, buffer in self.buffers.items():
            buffer.load_state_dict(state["buffers"][str(source)])
        for source, scheduler in self.schedulers.items():
            scheduler.load_state_dict(state["schedulers"][str(source)])


Text = Rollout | None
"""A prompt with its new completion; None where nothing could be written."""


def _sampling(policy: Any) -> Sampling:
    return Sampling(policy.temperature, policy.top_p, policy.top_k)


def _has_text(policy: Any) -> bool:
    return policy.name == "pairs" and policy.teacher_text == "source"
