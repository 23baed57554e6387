"""What both sides must agree on: messages, wire format, topology, transport."""
