"""`python -m selftaught.harness`: the command `lm_eval`, with the model `selftaught`.

Running this module imports the package first, which registers the model.
"""

from lm_eval.__main__ import cli_evaluate

if __name__ == "__main__":
    cli_evaluate()
