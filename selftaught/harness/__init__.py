"""Models in lm-evaluation-harness (the package lm_eval): `--model selftaught`.

`import selftaught.harness` registers the model, for `lm_eval.simple_evaluate(model="selftaught")`.
`python -m selftaught.harness` is the command `lm_eval` after that import.
"""

from importlib.util import find_spec

if find_spec("lm_eval") is None:
    raise ModuleNotFoundError(
        'lm_eval is not installed, which this module needs: pip install "selftaught[lm-eval]".'
    )

from selftaught.harness.model import SelfTaughtLM

__all__ = ["SelfTaughtLM"]
