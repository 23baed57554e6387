"""Named tensors: how they lie in memory, their arithmetic, checkpoints, compression."""
