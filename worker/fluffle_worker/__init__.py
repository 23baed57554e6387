"""The worker: trains a task on data that never leaves its machine."""
