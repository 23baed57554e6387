"""Codecs, which encode a tensor of an update in fewer bytes; one file each."""
