"""Strategies, pure: decode and check updates, sum them, and step to the next model."""
