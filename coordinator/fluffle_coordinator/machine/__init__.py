"""The coordinator's pure state machine: state and event in, next state and effects out."""
