"""Code that a model wrote, run where it can do nothing but compute."""

from selectkd.evals.sandbox.grader import Verdict, run_tests
from selectkd.evals.sandbox.level import Level, level, require

__all__ = ["Level", "Verdict", "level", "require", "run_tests"]
