"""Simulated federations: any number of clients, one process, simulated time."""
