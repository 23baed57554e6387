"""The running coordinator: asyncio code that carries out the state machine's effects."""
