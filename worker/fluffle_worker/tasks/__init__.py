"""Adapters that make tasks from models of Flax and scikit-learn."""
