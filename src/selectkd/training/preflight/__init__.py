"""Before a run: whether it can train (doctor) and what it needs (estimate)."""
