"""The suite ``instruct``: requests with a reference answer, a model's own answers, and a judge between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from selectkd.data.files import read_records
from selectkd.errors import DataError
from selectkd.evals.asking import Decoding, complete
from selectkd.evals.judging.contest import Contest, Pair, contest
from selectkd.evals.judging.judges import Judge
from selectkd.evals.judging.protocols import Protocol
from selectkd.evals.memory import Memory
from selectkd.evals.prompts import prompt_ids
from selectkd.models.load import Loaded

REQUEST_KEYS = ("instruction", "prompt", "question", "request")
REFERENCE_KEYS = ("output", "reference", "completion", "response")


@dataclass(frozen=True)
class Request:
    """What is asked, and the reference's answer."""

    text: str
    reference: str


def read_requests(path: Path, limit: int | None) -> list[Request]:
    """Requests of a file in AlpacaEval's shape {instruction, input, output}, or with other names for the same."""
    found = []
    for origin, record in read_records(str(path), limit=limit):
        asked = next((record[key] for key in REQUEST_KEYS if record.get(key)), None)
        reference = next((record[key] for key in REFERENCE_KEYS if record.get(key)), None)
        if not isinstance(asked, str) or not isinstance(reference, str):
            raise DataError(
                f"{origin}: no request with a reference answer. It needs instruction and output (AlpacaEval)."
            )
        more = record.get("input")
        found.append(Request(f"{asked}\n\n{more}" if more else asked, reference))
    return found


def answered(
    loaded: Loaded,
    requests: Sequence[Request],
    protocol: Protocol,
    *,
    seed: int,
    batch_size: int,
    memory: Memory | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[Pair]:
    """The model's answers beside the reference's, sampled as the protocol says."""
    prompts = [prompt_ids(one.text, loaded.tokenizer) for one in requests]
    texts = complete(
        loaded,
        prompts,
        _decoding(protocol, seed),
        batch_size=batch_size,
        memory=memory,
        on_progress=on_progress,
    )
    return [Pair(one.text, text.strip(), one.reference) for one, text in zip(requests, texts, strict=True)]


def judged(
    name: str,
    task: str,
    pairs: Sequence[Pair],
    judge: Judge,
    protocol: Protocol,
    *,
    memory: Memory,
    seed: int,
    settings: dict[str, Any],
) -> tuple[list[dict[str, Any]], Contest]:
    """The rows of a contest: the win rate, and beside it the rate at equal length."""
    seen = contest(pairs, judge, memory=memory, seed=seed)
    counted = {"wins": seen.wins, "ties": seen.ties, "losses": seen.losses, "invalid": seen.invalid}
    shown_settings = {
        **settings, **asdict(_decoding(protocol, seed)), "judge": judge.name, "reference": protocol.reference,
        "orders": "both", "tie": 0.5, **counted,
    }  # fmt: skip
    rows = [
        {
            "model": name, "task": task, "metric": metric, "value": one.value, "low": one.low, "high": one.high,
            "n": one.n, "settings": shown_settings,
        }
        for metric, one in (("win_rate", seen.win_rate), ("length_controlled_win_rate", seen.length_controlled))
    ]  # fmt: skip
    return rows, seen


def _decoding(protocol: Protocol, seed: int) -> Decoding:
    return Decoding(
        protocol.max_new_tokens, temperature=protocol.temperature, top_p=protocol.top_p, seed=seed
    )
