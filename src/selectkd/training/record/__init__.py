"""What a run leaves behind: metrics, progress lines, manifest, model card and result."""
