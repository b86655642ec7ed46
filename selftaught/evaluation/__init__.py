"""Evaluation of models: accuracy on a task, choice among candidates, verifiers, best-of-n."""
