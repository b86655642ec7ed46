"""Run folders: lock, configuration, metrics, status, checks before work begins."""
