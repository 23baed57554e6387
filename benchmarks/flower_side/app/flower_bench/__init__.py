"""Flower's production engine: the two apps that ``flwr run`` hands to it."""
