"""How true an export is to its student: ids, ends, template, KL, top-1 and greedy agreement, acceptance as a draft.

The student answers some prompts greedily in fp32. The export then reads prompt and answer, so one pass a text gives its
KL to the student, and whether it would have written the same answer. n texts, t tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from selectkd.data.alignment import PROBES
from selectkd.evals.speculative.measure import Alone, expected_speedup, speculation, timed_alone
from selectkd.evals.statistics import Interval, bootstrap_ratio
from selectkd.models.export.exported import Exported, encoder, model_logits, template_of
from selectkd.models.export.student import Student
from selectkd.models.load import Loaded
from selectkd.rollouts.generate import Ends, Request, ends_of, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling

MOST_SPECIAL = 64
"""Special tokens that ids are compared around."""
LENGTHS = (1, 2, 3, 4, 6, 8)
"""Draft lengths that are compared where none is given."""

BOUNDS = {
    "f32": 1e-6, "f16": 3e-5, "bf16": 2e-3, "q8_0": 2e-2, "q5_1": 5e-1, "q4_0": 1.5,
}  # fmt: skip
"""The KL in nats a token above which an export is refused, by number format: a net for damage, several times what a
faithful export of a model of 135 million parameters gives, which rounding hurts most. `--bound` sets a tighter one.
Measured on it and its students (benchmarks/export_types.py, docs/log.md): f16 3.7e-6 to 5.0e-6, bf16 7.0e-5 to 2.2e-4,
q8_0 .0015 to .0086, q5_1 .153, q4_0 .352 to .387.
"""


@dataclass(frozen=True)
class Fidelity:
    """kl: of student to export, nats a token; top1: the share of tokens with the same best token; both with bootstraps
    over texts. greedy_same: answers that the export writes to the last token, of ``texts``. gaps: for each other
    answer, from small to large, the nats by which the student prefers its token to the export's where they part.
    different_ids: texts that become other ids, of ``id_texts``. differences: ends, template and settings that came back
    otherwise.
    """

    texts: int
    tokens: int
    kl: Interval
    top1: Interval
    greedy_same: int
    gaps: list[float]
    id_texts: int
    different_ids: list[str]
    differences: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    def greedy(self) -> str:
        """How many answers are the same, and how close the student's choice was where the others part."""
        same = f"{self.greedy_same} of {self.texts}"
        if not self.gaps:
            return same
        low, high = f"{self.gaps[0]:.2g}", f"{self.gaps[-1]:.2g}"
        shown = (
            f"{low} nats" if len(self.gaps) == 1 else f"{low} to {high} nats, median {median(self.gaps):.2g}"
        )
        others = "the other parts" if len(self.gaps) == 1 else "the others part"
        return f"{same}; {others} where the student prefers its token to the export's by {shown}"

    def failures(self, bound: float) -> list[str]:
        """Why the export is refused, in words; [] where it is true to its student."""
        found = list(self.differences)
        if self.different_ids:
            found.append(
                f"{len(self.different_ids)} of {self.id_texts} texts become other ids, such as {self.different_ids[0]}"
            )
        if not self.kl.high <= bound:
            found.append(
                f"its KL to the student is {self.kl.value:.3g} nats a token, at most {self.kl.high:.3g}, and the bound "
                f"is {bound:g}"
            )
        return found


@dataclass(frozen=True)
class Answers:
    """Prompts and the student's greedy answers, as ids."""

    prompts: list[list[int]]
    answers: list[list[int]]


def answers_of(student: Student, prompts: Sequence[list[int]], tokens: int) -> Answers:
    """The student's greedy answers of at most ``tokens`` tokens."""
    requests = [Request(tuple(prompt), tokens) for prompt in prompts]
    written = generate(
        [student.model], requests, Draw(Sampling(0.0)), ends=Ends(student.ends), width=len(student.tokenizer)
    )
    return Answers(list(map(list, prompts)), [one.ids for one in written])


@torch.no_grad()
def fidelity(student: Student, exported: Exported, answers: Answers, texts: Sequence[str]) -> Fidelity:
    """Compares an export with its student on the student's answers, and their ids on ``texts`` and the probes."""
    ours, width = model_logits(student.model), len(student.tokenizer)
    kl: list[float] = []
    same: list[float] = []
    counts: list[int] = []
    gaps: list[float] = []
    for prompt, answer in zip(answers.prompts, answers.answers, strict=True):
        ids = torch.tensor([*prompt, *answer])
        logp, logq = (
            torch.log_softmax(logits(ids)[:, :width].double().cpu(), -1) for logits in (ours, exported.logits)
        )
        apart = (logp.exp() * (logp - logq)).sum(-1)  # [t]
        best = logq.argmax(-1)
        kl.append(float(apart.sum()))
        same.append(float((best == logp.argmax(-1)).sum()))
        counts.append(len(ids))
        parting = _parting(logp[len(prompt) - 1 : -1], best[len(prompt) - 1 : -1], ids[len(prompt) :])
        gaps += [] if parting is None else [parting]
    compared = id_texts(student.tokenizer, texts)
    encode = encoder(student.tokenizer)
    different = [
        repr(text[:40])
        for text, special in compared
        if exported.encode(text, special) != encode(text, special)
    ]
    return Fidelity(
        texts=len(counts),
        tokens=sum(counts),
        kl=bootstrap_ratio(kl, counts),
        top1=bootstrap_ratio(same, counts),
        greedy_same=len(counts) - len(gaps),
        gaps=sorted(gaps),
        id_texts=len(compared),
        different_ids=different,
        differences=_differences(student, exported),
    )


def _parting(logp: Float[Tensor, "t v"], best: Int[Tensor, " t"], answer: Int[Tensor, " t"]) -> float | None:
    """log p(answer) - log p(best) at the first token where both differ, p being the student; None where none does.

    best: the export's best tokens. answer: the student's.
    """
    apart = (best != answer).nonzero()
    if not len(apart):
        return None
    first = int(apart[0])
    return float(logp[first, answer[first]] - logp[first, best[first]])


def id_texts(tokenizer: Any, texts: Sequence[str]) -> list[tuple[str, bool]]:
    """(text, whether the tokenizer adds its own ends): the probes, each special token within words, the prompts."""
    special = list(dict.fromkeys([*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]))[
        :MOST_SPECIAL
    ]
    around = [form.replace("TOKEN", token) for token in special for form in ("one TOKEN two", "xTOKENy\n")]
    composed = _composes(tokenizer)
    plain = [*(probe for probe in PROBES if not composed or composed(probe) == probe), *around]
    return [(text, flag) for text in plain for flag in (True, False)] + [(text, False) for text in texts]


def _composes(tokenizer: Any) -> Callable[[str], str] | None:
    """The normalizer of a tokenizer that composes letters; llama.cpp has none, so texts are compared composed."""
    normalizer: Any = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if normalizer is None or type(normalizer).__name__ != "NFC":
        return None
    return normalizer.normalize_str


def _differences(student: Student, exported: Exported) -> list[str]:
    found = list(exported.differences)
    if exported.ends != student.ends:
        found.append(
            f"the ids {sorted(exported.ends)} end a text of the export, and {sorted(student.ends)} one of the student"
        )
    if exported.template != template_of(student.tokenizer):
        found.append("the chat template of the export is another")
    return found


@dataclass(frozen=True)
class Drafted:
    """Acceptance of greedy drafts by a target, before and after export; after is None where the export is no torch
    module. speedup: expected of the student by Leviathan's theorem; cost_ratio: its pass over the target's.
    """

    draft_length: int
    before: Interval
    after: Interval | None
    cost_ratio: float
    speedup: float


def timed_target(student: Student, target: Loaded, prompts: Sequence[list[int]], tokens: int) -> Alone:
    """The target's own texts behind the prompts."""
    ids = [torch.tensor(prompt) for prompt in prompts]
    ends = ends_of(target.tokenizer, target.model) | student.ends
    return timed_alone(target.model, ids, max_new_tokens=tokens, eos=ends)


def drafted(
    student: Student, target: Loaded, prompts: Sequence[list[int]], alone: Alone, length: int | None
) -> Drafted:
    """The acceptance of the student's drafts. length: of a draft; None takes the one of ``LENGTHS`` with the highest
    speed-up that acceptance and cost ratio promise.
    """
    ids = [torch.tensor(prompt) for prompt in prompts]
    tried = length or LENGTHS[len(LENGTHS) // 2]
    found = speculation(target.model, student.model, ids, draft_length=tried, alone=alone)
    promised = {
        g: expected_speedup(found.acceptance.value, g, found.costs.ratio)
        for g in ([length] if length else LENGTHS)
    }
    best = max(promised, key=promised.__getitem__)
    if best != tried:
        found = speculation(target.model, student.model, ids, draft_length=best, alone=alone)
    return Drafted(best, found.acceptance, None, found.costs.ratio, promised[best])


def drafted_after(
    before: Drafted, exported: Exported, target: Loaded, prompts: Sequence[list[int]], alone: Alone
) -> Drafted:
    """The same with the acceptance of the export's drafts."""
    if exported.model is None:
        return before
    ids = [torch.tensor(prompt) for prompt in prompts]
    found = speculation(target.model, exported.model, ids, draft_length=before.draft_length, alone=alone)
    return replace(before, after=found.acceptance)
