"""Local rules: what is done to the gradients of a worker's training."""
