"""The commands broker, queues, peek, tap and rejected."""
