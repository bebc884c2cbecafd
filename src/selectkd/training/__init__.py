"""Training: one step, the plain loop, the transformers.Trainer, and what a run leaves behind."""
