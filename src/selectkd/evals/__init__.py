"""Whether a student is good: statistics, tasks, judge, landscape and dynamics, each of them one module."""
