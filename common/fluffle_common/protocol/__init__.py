"""What both sides say to each other: messages, their bytes, and every name on the broker."""
