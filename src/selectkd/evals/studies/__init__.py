"""Studies: the paper's questions as comparisons that run."""
