"""Checks a third-party worker against docs/protocol.md by playing a coordinator."""
