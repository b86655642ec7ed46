"""Sampling and scoring in this process with transformers."""
