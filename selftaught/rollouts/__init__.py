"""Sampled completions: storage, grading and selection."""
