"""The transport contract, reconnecting, sending and fetching messages, and an in-memory broker."""
