"""Evaluation with images: answers read by published rules, benchmarks from local files, scenes that are drawn."""
