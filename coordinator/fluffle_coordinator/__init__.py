"""The coordinator: opens rounds, averages updates, keeps the run."""
