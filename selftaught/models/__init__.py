"""The model in this package, and models made from packages."""
