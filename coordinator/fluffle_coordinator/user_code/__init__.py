"""Loads and calls users' own strategies, schedules, selections and hooks."""
