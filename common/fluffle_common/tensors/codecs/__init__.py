"""Codecs: how one tensor of an update travels in fewer bytes; one file each."""
