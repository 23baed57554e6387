"""The letters task: classify handwritten letters A to J in grey images of 100 by 100 pixels."""
