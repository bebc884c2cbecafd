"""A student for other people's runtimes: each target writes a folder, and reads it back for the check.

``targets.TARGETS`` is the table; ``evals.exported`` measures what comes back.
"""
