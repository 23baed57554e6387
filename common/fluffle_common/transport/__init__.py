"""How messages travel: the contract, staying connected, sending, and a broker in memory."""
