"""Adapters that make tasks from models of Flax, PyTorch and scikit-learn."""
