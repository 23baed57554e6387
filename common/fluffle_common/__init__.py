"""Code shared by coordinator and workers: messages, wire format, topology, transport."""
