"""Named tensors: memory layout, arithmetic, checkpoints, compression."""
