"""Checks of a model's weight files before they are loaded."""


def check_weights(model: str) -> None:
    """Do nothing; stands in for the check of weight headers that is written elsewhere."""
    del model
