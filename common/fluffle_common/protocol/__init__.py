"""The protocol: messages, their encoding, run events, and every name on the broker."""
