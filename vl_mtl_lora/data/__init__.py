"""Samples in webdataset shards: writing, reading, mixing."""
