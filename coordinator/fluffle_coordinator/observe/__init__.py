"""What can be seen of a run: watchers, the journal, and what explains it."""
