"""The coordinator's machine, pure: from state and event to state and effects."""
