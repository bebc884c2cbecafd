"""``selectkd generate``: the prompts of a recipe become a file of texts by its teacher, its student, or both."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from selectkd.data.collate import collate
from selectkd.data.render import pad_id_of
from selectkd.data.rewrite import Rollout, last_turns
from selectkd.errors import ConfigError, DataError
from selectkd.rollouts.completion_server import CompletionServer
from selectkd.rollouts.generate import Completion, Request, ends_of, generate, prompt_key
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.rollouts.store import TextStore
from selectkd.training.assembly import assemble
from selectkd.training.checks import prepare

BATCH = 64
"""Prompts between two writes to the file: what a kill can cost."""


@dataclass(frozen=True)
class WritingJob:
    """The texts to write. by: teacher, student or both; copies: texts of each prompt; server: writes in the
    teacher's place.
    """

    by: tuple[str, ...]
    sampling: Sampling
    copies: int = 1
    max_new_tokens: int | None = None
    server: CompletionServer | None = None


@dataclass(frozen=True)
class WrittenFile:
    """What came of it: texts written now, those that were there, prompts that stood twice or left no room, tokens."""

    written: int
    found: int
    twice: int
    no_room: int
    tokens: int


def job_of(
    recipe: Any, by: str | None, *, copies: int = 1, server: CompletionServer | None = None
) -> WritingJob:
    """What the recipe's policy asks for: its writer and its sampling, or ``by`` instead of its writer."""
    policy = recipe.data.policy
    writers = {"student": ("student",), "adaptive": ("student",), "pairs": ("teacher", "student")}
    chosen = writers.get(policy.name, ("teacher",)) if by is None else tuple(by.split("+"))
    if (
        not chosen
        or any(one not in ("teacher", "student") for one in chosen)
        or len(set(chosen)) < len(chosen)
    ):
        raise ConfigError(f"--by {by!r} must be teacher, student or teacher+student.")
    asked = dict(policy)
    sampling = Sampling(asked.get("temperature", 1.0), asked.get("top_p", 1.0), asked.get("top_k"))
    most = asked.get("max_new_tokens") or recipe.data.max_new_tokens
    return WritingJob(chosen, sampling, copies, most, server)


def write(
    recipe: Any, file: Path, job: WritingJob, *, device: torch.device | str = "cpu",
    on_texts: Callable[[int, int], None] | None = None,
) -> WrittenFile:  # fmt: skip
    """Writes the texts that ``file`` does not hold yet; the prompts are those of the recipe's training text.

    A prompt that stands twice is written to once. The text of a prompt is a function of (seed, prompt, copy), so a run
    that was cut short leaves the file it would have left. on_texts hears (written, wanted). Raises DataError where the
    file holds other text, ConfigError where the teacher cannot write.
    """
    store = TextStore.opened(file)
    seed, room = recipe.training.seed, recipe.training.max_length
    plan = prepare(recipe, device=device)
    pad = pad_id_of(plan.tokenizer)
    if plan.text.vision is not None:
        raise ConfigError(
            "selectkd generate writes token ids, which hold no images. Use a policy that writes during training, such "
            "as data.policy: student, or a text model."
        )
    turns: dict[int, Rollout] = {}
    examples = plan.examples
    for example in examples:
        (turn,) = last_turns(collate([example], pad_id=pad))
        turns.setdefault(prompt_key(turn.prompt), turn)
    fits = [turn for turn in turns.values() if turn.prompt and len(turn.prompt) < room]
    if not fits:
        raise DataError("no prompt leaves room for an answer. Raise training.max_length.")
    writers = _writers(recipe, plan, job, device)
    for name in job.by:
        store.check(_origin_of(name, writers[name], job, seed))
    asked = [
        (name, Request(turn.prompt, min(job.max_new_tokens or room, room - len(turn.prompt)), copy))
        for name in job.by
        for turn in fits
        for copy in range(job.copies)
    ]
    missing = [(name, one) for name, one in asked if not store.holds(name, one.prompt, one.copy)]
    written = tokens = 0
    for name in job.by:
        requests = [request for other, request in missing if other == name]
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            texts = writers[name].write(part, job, plan.tokenizer, seed)
            origin = _origin_of(name, writers[name], job, seed)
            store.add(
                _record(request, text, origin, plan.tokenizer)
                for request, text in zip(part, texts, strict=True)
                if text.ids
            )
            written += len(part)
            tokens += sum(len(text.ids) for text in texts)
            if on_texts is not None:
                on_texts(written, len(missing))
    return WrittenFile(
        written,
        len(asked) - len(missing),
        len(examples) - len(turns),
        len(turns) - len(fits),
        tokens,
    )


@dataclass(frozen=True)
class _Writer:
    """A model in memory, or a server, that writes under a name."""

    model: Any
    source: str
    revision: str | None

    def write(
        self, requests: Sequence[Request], job: WritingJob, tokenizer: Any, seed: int
    ) -> list[Completion]:
        if isinstance(self.model, CompletionServer):
            end = min(ends_of(tokenizer), default=None)
            return self.model.complete(requests, job.sampling, tokenizer=tokenizer, end=end, seed=seed)
        return generate(
            [self.model],
            requests,
            Draw(job.sampling),
            ends=ends_of(tokenizer, self.model),
            width=len(tokenizer),
            seed=seed,
        )


def _writers(recipe: Any, plan: Any, job: WritingJob, device: torch.device | str) -> dict[str, _Writer]:
    found: dict[str, _Writer] = {}
    if "teacher" in job.by and job.server is not None:
        found["teacher"] = _Writer(job.server, f"{job.server.model} at {job.server.url}", None)
    elif "teacher" in job.by:
        if plan.teacher.model is None or plan.teacher.payload != "live":
            raise ConfigError(
                f"{plan.teacher.source} is no model in memory that could write. Use teacher: {{model: ...}}, or "
                "--server URL."
            )
        loaded = plan.teacher.loaded().on(device)
        found["teacher"] = _Writer(loaded.model, plan.teacher.source, loaded.revision)
    if "student" in job.by:
        with tempfile.TemporaryDirectory() as empty:  # nothing is left in a run folder
            training = recipe.training.model_copy(update={"output_dir": empty})
            assembly = assemble(recipe.model_copy(update={"training": training}), device=device)
        found["student"] = _Writer(assembly.student, assembly.student_source, assembly.student_revision)
    return found


def _origin_of(name: str, writer: _Writer, job: WritingJob, seed: int) -> dict[str, Any]:
    sampling = {**asdict(job.sampling), "max_new_tokens": job.max_new_tokens}
    return {
        "written_by": name,
        "model": writer.source,
        "revision": writer.revision,
        "sampling": sampling,
        "seed": seed,
    }


def _record(request: Request, text: Completion, origin: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    prompt = list(request.prompt)
    shown = {"prompt": tokenizer.decode(prompt), "answer": tokenizer.decode(text.ids)}
    return {
        "input_ids": [*prompt, *text.ids],
        "completion_mask": [0] * len(prompt) + [1] * len(text.ids),
        **origin,
        "copy": request.copy,
        "ended": text.ended,
        "shown": shown,
    }
