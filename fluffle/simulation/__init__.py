"""A federation of any number of simulated clients, in one process and in time of its own."""
