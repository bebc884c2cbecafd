"""Held-out text: its measures during a run, their breakdown, and when they stop the run."""
