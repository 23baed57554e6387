"""The schedules that fluffle comes with, one file each."""
