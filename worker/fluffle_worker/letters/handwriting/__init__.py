"""Draws images of handwritten letters, to try fluffle without data."""
