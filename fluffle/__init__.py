"""fluffle: federated learning over a message broker."""
