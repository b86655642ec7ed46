"""Processes besides this one: Ray clusters."""
