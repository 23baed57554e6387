"""The running coordinator: the machine's effects carried out."""
