"""Sampled completions: storing, grading, selecting."""
