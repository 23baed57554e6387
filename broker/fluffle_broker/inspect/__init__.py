"""Inspecting queues and messages without changing them."""
