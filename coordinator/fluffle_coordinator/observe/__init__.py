"""Observation of a run: watchers, the journal, and the folds that explain what happened."""
