"""The run folder: checkpoints, the history, archived updates, and their replay."""
