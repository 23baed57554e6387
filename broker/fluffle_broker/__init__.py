"""The broker: a private RabbitMQ node, and the looking into its queues."""
