"""The compressed key-value cache of CSKV (arXiv 2409.10593): what a model needs to decode with it."""
