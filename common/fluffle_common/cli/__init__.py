"""What every command shares: the program, its settings, its output, its process."""
