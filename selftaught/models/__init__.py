"""The small model in this package, and models from PyPI packages."""
