"""The coordinator's pure state machine: it maps a state and an event to a state and effects."""
