"""Code shared by the coordinator and the workers: messages, wire format, topology, transport."""
