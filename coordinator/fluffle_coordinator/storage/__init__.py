"""The folder of a run: checkpoints, history, kept updates, and their replay."""
