"""Generation: prompts in, completions out, by one model or by two that write together. Rules say how a token is
chosen.
"""

from __future__ import annotations

from selectkd.generation.engine import Completion, Request, ends_of, generate, prompt_key
from selectkd.generation.rules import Draw, Interleaved, Mixed, Rule
from selectkd.generation.sampling import Sampling

__all__ = [
    "Completion",
    "Draw",
    "Interleaved",
    "Mixed",
    "Request",
    "Rule",
    "Sampling",
    "ends_of",
    "generate",
    "prompt_key",
]
