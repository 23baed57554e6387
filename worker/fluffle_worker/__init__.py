"""The worker: trains a task on data that stays where it is."""
