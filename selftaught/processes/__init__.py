"""Other processes: worker subprocesses and Ray clusters."""
