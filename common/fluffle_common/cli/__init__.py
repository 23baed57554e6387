"""What all commands share: the program, options and settings, output, signals."""
