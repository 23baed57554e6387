"""The built-in schedules, one file each."""
