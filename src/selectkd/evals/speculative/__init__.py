"""Draft-and-verify decoding: a student writes ahead, its teacher checks, and nothing changes but the time."""
