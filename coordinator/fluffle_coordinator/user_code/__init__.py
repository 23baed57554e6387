"""The code of users: strategies, schedules, selections and hooks are loaded and called here."""
