"""Measurements of the package; nothing here is installed with it."""
