"""Plays a coordinator against somebody's worker, and judges what the worker does."""
