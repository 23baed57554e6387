"""The two apps that ``flwr run`` submits to Flower's production engine."""
