"""The state of every random number generator that a step may draw from: Python, numpy, torch, each accelerator."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


class Generators:
    """The process's generators as one part of a checkpoint; setting the state is exact."""

    def state_dict(self) -> dict[str, Any]:
        """All states, small: some 8 KB and 16 bytes an accelerator."""
        state = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=True),
            "torch": torch.get_rng_state(),
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state_all()
        if torch.xpu.is_available():
            state["xpu"] = torch.xpu.get_rng_state_all()
        if torch.backends.mps.is_available():
            state["mps"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets the generators; accelerators that are no longer there are passed over."""
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        if "xpu" in state and len(state["xpu"]) == torch.xpu.device_count():
            torch.xpu.set_rng_state_all(state["xpu"])
        if "mps" in state and torch.backends.mps.is_available():
            torch.mps.set_rng_state(state["mps"])
