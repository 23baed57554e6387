"""What people see of a run: log, journal, and explanations of what happened."""
