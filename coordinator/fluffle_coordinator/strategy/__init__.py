"""Strategies: pure functions that decode, check and sum updates, and compute the next model."""
