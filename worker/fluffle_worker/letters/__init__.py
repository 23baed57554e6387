"""The letters task: handwritten A to J, 100 by 100 pixels, grey."""
