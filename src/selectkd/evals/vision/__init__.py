"""What a model that sees images is worth: answers read by published rules, benchmarks from local files, drawn scenes."""
