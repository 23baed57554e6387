"""The schedules that fluffle brings; one file each."""
