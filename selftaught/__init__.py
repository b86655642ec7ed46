"""Language models that teach themselves to reason."""
