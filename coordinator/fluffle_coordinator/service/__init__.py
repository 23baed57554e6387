"""The running coordinator: asyncio code that carries out the effects of the machine."""
