"""Models in lm-evaluation-harness (the package lm_eval): `--model selftaught`.

`import selftaught.harness` registers the model, for `lm_eval.simple_evaluate(model="selftaught")`.
`python -m selftaught.harness` is the command `lm_eval` after that import.
"""

from selftaught.harness.model import SelfTaughtLM

__all__ = ["SelfTaughtLM"]
