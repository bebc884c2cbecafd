"""Which targets there are, and the number formats of each: known without torch, so that a wrong name ends at once."""

from __future__ import annotations

from selectkd.errors import ConfigError
from selectkd.objective.registry import did_you_mean

FLOATS = ("f32", "f16", "bf16")
KINDS: dict[str, tuple[str, ...]] = {
    "hf": FLOATS,
    "merged": FLOATS,
    "adapter": FLOATS,
    "gguf": ("f16", "f32", "bf16", "q8_0", "q5_1", "q4_0"),
    "vllm-draft": ("bf16", "f32", "f16"),
    "sglang-draft": ("bf16", "f32", "f16"),
    "onnx": ("f32",),
    "mlx": ("bf16", "f16", "f32"),
}
"""The number formats of each target, the default one first."""
CALIBRATED = ("q8_0", "q5_1", "q4_0")
"""The number formats of GGUF that texts help to round to."""
DRAFTS = frozenset({"vllm-draft", "sglang-draft"})
"""Targets that are written for another model, which must be named."""
K_QUANTS = tuple(f"q{bits}_k{size}" for bits in (2, 3, 4, 5, 6) for size in ("", "_s", "_m", "_l"))
"""llama.cpp's formats of 256 numbers, which its own program alone makes."""


def kind_of(target: str, kind: str | None) -> str:
    """The number format of an export; ConfigError for a target or format that is none, with what makes it."""
    known = KINDS.get(target)
    if known is None:
        raise ConfigError(
            f"--to {target} is no target.{did_you_mean(target, KINDS)} Use one of: {', '.join(KINDS)}."
        )
    kind = known[0] if kind is None else kind.lower()
    if kind in known:
        return kind
    if target == "gguf" and kind in K_QUANTS:
        raise ConfigError(
            f"--type {kind} is made by llama.cpp alone. Export with --type f16, then run: llama-quantize "
            f"student-f16.gguf student-{kind}.gguf {kind.upper()}."
        )
    if target == "mlx" and kind.startswith("q"):
        raise ConfigError(
            f"--type {kind} is made by MLX itself. Export with --type bf16, then run: mlx_lm.convert "
            "--hf-path FOLDER -q --q-bits 4."
        )
    raise ConfigError(f"--to {target} has no --type {kind}. Use one of: {', '.join(known)}.")
