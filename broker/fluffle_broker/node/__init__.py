"""A private RabbitMQ node: find or unpack, configure, start and stop it."""
