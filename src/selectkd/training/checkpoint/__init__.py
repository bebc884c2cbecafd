"""Checkpoints: what a run needs to go on as if nothing had happened, written whole or not at all."""

from selectkd.training.checkpoint.checkpoints import Checkpoints, Stateful
from selectkd.training.checkpoint.folder import find, read_part, write

__all__ = ["Checkpoints", "Stateful", "find", "read_part", "write"]
