"""A private RabbitMQ: find or unpack it, configure, start and stop it."""
