"""Compression of the key-value cache."""
