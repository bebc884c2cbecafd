"""A run folder written by hand: any texts, any numbers, as large as a test wants it, without a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from selectkd.data.durable import json_bytes, sealed

HOSTILE = (
    "</script><script>window.hacked=1</script>", '"><img src=x onerror="window.hacked=1">',
    "javascript:window.hacked=1",
    "{{7*7}}{% raw %}", "\u202eright to left", "\x1b[31mred\x1b]8;;http://evil.example\x07", "<!--", "]]>", "a\x00b",
    "<a href='javascript:window.hacked=1'>click</a>", "' onmouseover=window.hacked=1 '",
)  # fmt: skip
"""Tokens and answers that a page must show and not obey."""


def write_run(
    folder: Path,
    *,
    texts: int = 6,
    tokens: int = 40,
    looks: Sequence[int] = (0, 10, 20),
    words: Sequence[str] = ("The", " capital", " of", " France", " is", " Paris", ".", "\n"),
    finished: bool = True,
    seed: int = 0,
) -> Path:
    """A run of 20 steps whose probe has ``texts`` of ``tokens`` supervised tokens behind a prompt of three."""
    rng = np.random.default_rng(seed)
    probe = folder / "probe"
    probe.mkdir(parents=True)
    n, every = texts * tokens, tokens + 3
    ids = rng.integers(0, len(words), (texts, every))
    samples = [{"stream": "data", "ids": row.tolist(), "tokens": [words[i] for i in row]} for row in ids]
    (probe / "texts.json").write_bytes(json_bytes({"format": 1, "samples": samples}))
    tars = []
    for step in looks:
        columns = look_columns(rng, n, texts, tokens, len(words), better=step / 20)
        columns["label"] = ids[:, 3:].reshape(-1).astype(np.int32)
        accepted = columns["acceptance"].reshape(texts, tokens)
        tars.append(float(accepted.mean(1, dtype=np.float64).mean()))
        noted = {"step": step, "rows": n, "pieces": dict(enumerate(words))}
        save_file(columns, probe / f"step-{step:07d}.safetensors", metadata={"look": json.dumps(noted)})
    lines: list[dict[str, Any]] = []
    for step, tar in zip(looks, tars, strict=True):
        measures = {
            "kl": 2.0 - step / 16,
            "perplexity": 12.0 - step / 4,
            "teacher_perplexity": 5.0,
            "tar": tar,
            "bite": 0.3,
        }
        lines.append({"step": step, "evaluation": measures, "probe_tar": tar})
    for step in range(1, 21):
        streams = {"data": {"tar": 0.5, "kl": 1.0, "divergence": 1.0}}
        lines.append(
            {
                "step": step, "loss": 2.0 / step, "kl": 2.0 / step, "tar": 0.3 + step / 50, "bite": 0.3, "lr": 1e-4,
                "grad_norm": 1.0, "tokens": step * 100, "tokens_per_second": None, "skipped": 0, "streams": streams,
            }
        )  # fmt: skip
    lines.sort(key=lambda line: line["step"])
    clock = [
        {"step": s, "time": 1e9 + s, "tokens_per_second": 100.0 + s, "peak_bytes": 3 << 30}
        for s in range(1, 21)
    ]
    for name, rows in (("metrics.jsonl", lines), ("timings.jsonl", clock)):
        folder.joinpath(name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    recipe = {
        "training.max_steps": 20,
        "teacher.model": "big",
        "student.model": "small",
        "objective.verifier.name": "greedy_topk",
    }
    folder.joinpath("run.json").write_bytes(sealed({"format": 1, "run": recipe}))
    if finished:
        held = [line["evaluation"] for line in lines if "evaluation" in line]
        before, after = held[0], held[-1]
        manifest = {
            "steps": 20,
            "seconds": 61.0,
            "before": before,
            "after": after,
            "skipped_steps": [],
            "versions": {"torch": "2"},
        }
        folder.joinpath("manifest.json").write_text(json.dumps(manifest), "utf-8")
    return folder


def look_columns(rng: Any, n: int, texts: int, tokens: int, words: int, *, better: float) -> dict[str, Any]:
    """Columns of a look with numbers at random, more of them accepted the larger ``better`` is."""
    accepted = rng.random(n) < 0.4 + 0.4 * better
    p, q = rng.random(n), rng.random(n)
    floats = {
        "acceptance": accepted, "divergence": rng.exponential(0.6, n), "weight": np.where(accepted, 1.0, 0.01),
        "overlap": rng.random(n), "unverified": np.zeros(n), "p_proposal": p, "q_proposal": q,
        "p_teacher_top": np.maximum(p, rng.random(n)), "q_teacher_top": q / 2, "p_label": p / 2, "q_label": q / 3,
        "teacher_entropy": rng.exponential(1.0, n), "student_entropy": rng.exponential(1.5, n),
    }  # fmt: skip
    share = floats["weight"] * floats["divergence"]
    whole = {
        "sample": np.repeat(np.arange(texts), tokens), "token": np.tile(np.arange(tokens) + 3, texts),
        "proposal": rng.integers(0, words, n), "teacher_top": rng.integers(0, words, n),
        "rank": np.where(accepted, rng.integers(1, 6, n), rng.integers(6, 400, n)),
    }  # fmt: skip
    return {
        name: np.asarray(x, np.float32) for name, x in {**floats, "share": share / share.sum()}.items()
    } | {name: x.astype(np.int32) for name, x in whole.items()}
