"""The transport over RabbitMQ; only this package imports aio_pika."""
