"""Drawn letters, for when no data is at hand."""
