"""Tools for the broker: a private RabbitMQ node, and commands that inspect queues."""
