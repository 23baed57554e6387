"""Local rules: changes to the gradients of a worker's training, such as FedProx or DP-SGD."""
