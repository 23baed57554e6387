"""The transport over RabbitMQ: all that knows aio_pika."""
