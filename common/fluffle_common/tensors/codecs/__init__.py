"""Codecs, which encode the tensors of an update in fewer bytes; one file each."""
