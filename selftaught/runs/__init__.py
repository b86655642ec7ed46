"""Run folders: lock, configuration, metrics, status, and checks before a run starts."""
