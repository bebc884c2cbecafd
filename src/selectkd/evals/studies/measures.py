"""What a study can measure of a trained student beside its held-out KL: MEASURES names it all.

Each takes an assembled run after its training, its student in evaluation mode, its recipe, and options by keyword, and
gives numbers for the run's row.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch

from selectkd.config.teachers import CacheTeacher
from selectkd.data.collate import collate
from selectkd.data.render import pad_id_of
from selectkd.data.rewrite import examples_of, last_turns
from selectkd.data.supervised import supervised
from selectkd.errors import ConfigError
from selectkd.evals.asking import Decoding
from selectkd.evals.dynamics import dynamics as dynamics_of
from selectkd.evals.heldout import divergence_loss
from selectkd.evals.landscape import sharpness, top_eigenvalue
from selectkd.evals.speculative.measure import speculation, timed_alone
from selectkd.evals.vision.model import VisionModel
from selectkd.evals.vision.synthetic import SCENES, run_synthetic
from selectkd.models.forward import hidden_rows
from selectkd.models.head import head_of
from selectkd.models.load import Loaded, load_model
from selectkd.rollouts.generate import Request, ends_of, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.live import LiveTeacher

Numbers = dict[str, float]
ROOM = 8
"""Tokens that a written completion may be longer than the text's own."""
DRAFTED, DRAFT_LENGTH, DRAFT_TOKENS = 16, 4, 48
"""Prompts, tokens a round and tokens in all of a timed speculative decoding: some seconds for 15 million parameters."""
LANDSCAPE_TEXTS = 16
ANSWER = 16
"""Tokens of an answer about a drawn scene."""
ANSWERS = 48
"""Of them at once."""
BINS = 10


def completions(assembly: Any, recipe: Any) -> Numbers:
    """Greedy completions of the held-out prompts. exact_match: the share that equals the text's, blanks at both ends
    aside, the accuracy where that is the one right answer. parse_rate: the share that is Python, prompt and completion
    together.
    """
    turns = [turn for batch in assembly.heldout for turn in last_turns(batch)]
    ends = ends_of(assembly.tokenizer, assembly.student)
    written = generate(
        [assembly.student],
        [Request(tuple(turn.prompt), len(turn.completion) + ROOM, images=turn.images) for turn in turns],
        Draw(Sampling(0.0, 1.0)), ends=ends, width=len(assembly.tokenizer),
    )  # fmt: skip

    def text(ids: Any) -> str:
        return assembly.tokenizer.decode([one for one in ids if one not in ends], skip_special_tokens=True)

    pairs = [(turn, text(one.ids)) for turn, one in zip(turns, written, strict=True)]
    right = [answer.strip() == text(turn.completion).strip() for turn, answer in pairs]
    python = [_parses(text(turn.prompt) + answer) for turn, answer in pairs]
    return {"exact_match": sum(right) / len(right), "parse_rate": sum(python) / len(python)}


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


@torch.no_grad()
def calibration(assembly: Any, recipe: Any) -> Numbers:
    """calibration_error: the mean gap, over BINS bins of confidence weighted by their tokens, between the student's
    probability of its best token and how often that is the text's.

    Source: Guo et al., On calibration of modern neural networks (arXiv 1706.04599), equation 3.
    """
    sure, right = [], []
    for batch in assembly.heldout:
        head = head_of(assembly.student)
        batch = batch.to(head.weight.device)
        seen = supervised(batch)
        logits = head.logits(hidden_rows(assembly.student, batch, seen.position))  # [n, v]
        best = torch.softmax(logits.float(), -1).max(-1)
        sure.append(best.values.cpu())
        right.append((best.indices == seen.labels).float().cpu())
    confidence, correct = torch.cat(sure), torch.cat(right)
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = [float((confidence[bins == one] - correct[bins == one]).sum().abs()) for one in range(BINS)]
    return {"calibration_error": sum(gaps) / len(confidence)}


def draft(assembly: Any, recipe: Any) -> Numbers:
    """The student as the draft of its teacher on held-out prompts, greedy: draft_acceptance, the measured draft_speedup
    over the teacher alone, and draft_exact, 1 where the texts are the teacher's own.
    """
    target = _teacher_model(assembly, recipe, "draft")
    turns = [turn for batch in assembly.heldout for turn in last_turns(batch)][:DRAFTED]
    prompts = [torch.tensor(turn.prompt, device=head_of(assembly.student).weight.device) for turn in turns]
    ends = ends_of(assembly.tokenizer, target)
    alone = timed_alone(target, prompts, max_new_tokens=DRAFT_TOKENS, eos=ends)
    found = speculation(target, assembly.student, prompts, draft_length=DRAFT_LENGTH, alone=alone)
    return {
        "draft_acceptance": found.acceptance.value,
        "draft_speedup": found.speedup_measured,
        "draft_exact": float(bool(found.same)),
    }


def sharp(assembly: Any, recipe: Any) -> Numbers:
    """top_eigenvalue of the Hessian of held-out KL, and sharpness, its mean rise under random kicks of a tenth of each
    row's norm."""
    target = _teacher_model(assembly, recipe, "sharpness")
    examples = [one for batch in assembly.heldout for one in examples_of(batch)][:LANDSCAPE_TEXTS]
    batch = collate(examples, pad_id=pad_id_of(assembly.tokenizer)).to(
        head_of(assembly.student).weight.device
    )
    loss = divergence_loss(assembly.student, target, batch)
    weights = list(assembly.student.parameters())
    return {"top_eigenvalue": top_eigenvalue(weights, loss), "sharpness": sharpness(weights, loss).value}


def dynamics(assembly: Any, recipe: Any) -> Numbers:
    """Theorem 1 on the run's probe: kappa with its interval, theorem_1_share and nondecreasing_share of the steps
    between looks, flips, and rank_correlation of TAR and held-out KL; what the looks do not give is left out."""
    seen = dynamics_of(recipe.training.output_dir)
    found = {
        **({} if seen.line is None else {"kappa": seen.line.kappa, "kappa_low": seen.line.low,
                                         "kappa_high": seen.line.high, "kappa_r_squared": seen.line.r_squared}),
        "theorem_1_share": seen.claim_share,
        "nondecreasing_share": seen.nondecreasing_share,
        "flips": float(seen.lost + seen.won),
        "rank_correlation": seen.rank_correlation,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def vision(assembly: Any, recipe: Any, *, scenes: int = SCENES, size: int = 224) -> Numbers:
    """The synthetic suite's metrics (docs/vision_evaluation.md), each as ``METRIC``, the mean of the five tasks, and as
    ``METRIC TASK``; beside them those with a blank image and with another scene's, as ``METRIC TASK (blank)``.

    ConfigError for a student that sees no images.
    """
    if assembly.vision is None:
        raise ConfigError("measures: vision needs a student that sees images, with its processor.")
    loaded = Loaded(assembly.student, assembly.tokenizer, "student", None)
    model = VisionModel(loaded, assembly.vision, Decoding(ANSWER))
    rows = run_synthetic("student", model, None, scenes=scenes, size=size, batch_size=ANSWERS)
    found = {f"{row.metric} {row.task}": round(row.interval.value, 5) for row in rows}
    of_metric: dict[str, list[float]] = {}
    for row in rows:
        _, _, shown = row.task.partition(" ")
        of_metric.setdefault(f"{row.metric} {shown}".rstrip(), []).append(row.interval.value)
    return found | {name: sum(values) / len(values) for name, values in of_metric.items()}


def _teacher_model(assembly: Any, recipe: Any, measure: str) -> Any:
    """The teacher in memory, or loaded where the cache says which it is of."""
    if isinstance(assembly.teacher, LiveTeacher):
        return assembly.teacher.model
    named = recipe.teacher
    if not isinstance(named, CacheTeacher) or named.model is None:
        raise ConfigError(
            f"measures: {measure} needs the teacher itself; set teacher to {{model: ...}}, or name the model beside "
            "the cache."
        )
    loaded = load_model(
        named.model, dtype=named.dtype or "float32", quantization=named.quantization, revision=named.revision,
        attn_implementation=named.attn_implementation,
    )  # fmt: skip
    return loaded.on(next(assembly.student.parameters()).device).model.eval()


MEASURES: Mapping[str, Callable[..., Numbers]] = MappingProxyType(
    {
        "completions": completions,
        "calibration": calibration,
        "draft": draft,
        "sharpness": sharp,
        "dynamics": dynamics,
        "vision": vision,
    }
)
